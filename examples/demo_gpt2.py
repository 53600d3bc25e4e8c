"""Train a 12-layer GPT-2 with half of eager's activation memory, and prove that the training is the same.

    make demo                      (or: python examples/demo_gpt2.py [--steps 5] [--fraction 0.5])

The model is built from a config (256 wide, 4 heads, sequence 256, batch 4, dropout 0.1) and trained on random tokens on
the CPU: nothing is downloaded. Printed are the plan, the peaks that were predicted and measured, and a comparison of
every loss, gradient and parameter with plain PyTorch, which must agree bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from planner import format_bytes, measure_step, plan, rewrite

SEED = 0


def build(layers: int, batch: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model and one batch of random tokens."""
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=256, n_head=4, n_positions=256, vocab_size=4096)).train()
    ids = torch.randint(0, 4096, (batch, 256))
    return model, {"input_ids": ids, "labels": ids}


def train(model: nn.Module, inputs: dict[str, torch.Tensor], steps: int) -> tuple[list[float], list[float]]:
    """A few steps of AdamW; returns the losses and the seconds of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(SEED)
    losses, seconds = [], []
    for _ in range(steps):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        seconds.append(time.perf_counter() - started)
        optimizer.step()
        losses.append(loss.item())
    return losses, seconds


def gradient_difference(plain: nn.Module, planned: nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """The largest difference between any two gradients of one step, dropout active."""
    for model in (plain, planned):
        model.zero_grad()
        torch.manual_seed(SEED)
        model(**inputs).loss.backward()
    pairs = zip(plain.parameters(), planned.parameters(), strict=True)
    return max(float((a.grad - b.grad).abs().max()) for a, b in pairs)


def main() -> None:
    """Plan, rewrite, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--fraction", type=float, default=0.5, help="of eager's memory above what is resident")
    options = parser.parse_args()

    plain, inputs = build(options.layers, options.batch)
    planned = copy.deepcopy(plain)
    eager = measure_step(plain, **inputs)
    budget = eager.resident_bytes + int(options.fraction * (eager.peak_bytes - eager.resident_bytes))
    made = plan(planned, budget, example_kwargs=inputs, gradient_accumulation=False)
    print(made, end="\n\n")
    rewrite(planned, made)

    difference = gradient_difference(plain, planned, inputs)
    measured = measure_step(planned, **inputs)
    losses, seconds = train(plain, inputs, options.steps)
    planned_losses, planned_seconds = train(planned, inputs, options.steps)
    parameters_equal = all(torch.equal(a, b) for a, b in zip(plain.parameters(), planned.parameters(), strict=True))
    step, planned_step = statistics.median(seconds), statistics.median(planned_seconds)
    rows = [
        ("budget", format_bytes(budget)),
        ("eager's peak, measured", format_bytes(eager.peak_bytes)),
        ("predicted peak", format_bytes(made.first_peak_bytes)),
        ("measured peak", format_bytes(measured.peak_bytes)),
        ("resident (parameters, inputs)", format_bytes(eager.resident_bytes)),
        ("overhead, predicted", f"{100 * made.overhead:.2f} % of the step"),
        ("lower bound", f"{100 * made.lower_bound:.2f} %"),
        ("gap", f"{100 * made.gap:.3f} %"),
        ("largest gradient difference", f"{difference:g}"),
        (f"losses of {options.steps} AdamW steps equal", str(losses == planned_losses)),
        ("parameters equal after them", str(parameters_equal)),
        ("step time, eager", f"{1000 * step:.0f} ms (median of {options.steps})"),
        ("step time, planned", f"{1000 * planned_step:.0f} ms ({planned_step / step:.2f} of eager's)"),
    ]
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:<{width}}  {text}")
    if difference or losses != planned_losses or not parameters_equal or measured.peak_bytes > budget:
        raise SystemExit("the planned training differs from plain PyTorch, or its peak is over the budget")


if __name__ == "__main__":
    main()
