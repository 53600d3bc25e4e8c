"""Plan on a laptop for an H100: which budget does a GPT-2 need there, and what does a smaller card cost?

    python examples/plan_for_h100.py [--layers 24] [--width 1024] [--batch 16] [--cards h100-80gb a100-40gb l4-24gb]

Model and inputs are fake tensors: nothing is allocated, and no GPU is needed. The budget is the card's whole memory.
AdamW's two moments in float32 and 2 GiB for the context and fragmentation are declared, since the card must hold them
as well; the plan shows them as lines of its own.
"""

from __future__ import annotations

import argparse

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graph_capture.devices import device_by_name
from planner import InfeasibleBudgetError, format_bytes, plan


def gpt2(layers: int, width: int, batch: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A GPT-2 in bfloat16 on fake tensors, and a batch of tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, attn_pdrop=0.0, use_cache=False)
    default = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = GPT2LMHeadModel(config).train()
        finally:
            torch.set_default_dtype(default)
        ids = torch.zeros(batch, 1024, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids}


def main() -> None:
    """One line per card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--cards", nargs="+", default=["h100-80gb", "a100-40gb", "l4-24gb"])
    parser.add_argument("--time-limit", type=float, default=30.0)
    options = parser.parse_args()
    for name in options.cards:
        card = device_by_name(name)
        model, inputs = gpt2(options.layers, options.width, options.batch)
        moments = 8 * sum(p.numel() for p in model.parameters())
        try:
            made = plan(
                model,
                card.memory_bytes,
                example_kwargs=inputs,
                device=card,
                time_limit_seconds=options.time_limit,
                extra_bytes={"AdamW's moments": moments, "context and fragmentation": 2 * 2**30},
            )
        except InfeasibleBudgetError as error:
            print(f"{card.name:<12}  does not fit: {error}")
            continue
        print(
            f"{card.name:<12}  store-all {format_bytes(made.store_all_peak_bytes, short=True)}, "
            f"planned {format_bytes(made.predicted_peak_bytes, short=True)} of "
            f"{format_bytes(made.budget_bytes, short=True)}, overhead {made.overhead:.2%} "
            f"(lower bound {made.lower_bound:.2%})"
        )


if __name__ == "__main__":
    main()
