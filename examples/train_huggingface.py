"""Train a GPT-2 with the Hugging Face `Trainer` within a memory budget.

    python examples/train_huggingface.py

The callback plans at the first training step and prints what it decided. The text is this repository's license, a
token a byte; nothing is downloaded. `--check` trains without the callback, too, and compares losses and parameters.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from planner.huggingface_trainer import CheckpointPlannerCallback

TEXT = Path(__file__).parents[1] / "LICENSE"


class Bytes(Dataset[dict[str, Tensor]]):
    """A text cut into sequences of bytes."""

    def __init__(self, text: bytes, length: int) -> None:
        tokens = torch.tensor(list(text))
        self.rows = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Losses(TrainerCallback):
    """Keeps what the `Trainer` logs of the loss."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Training and evaluation alike."""
        self.seen += [value for name, value in (logs or {}).items() if name in ("loss", "eval_loss", "grad_norm")]


def train(options: argparse.Namespace, *callbacks: TrainerCallback) -> tuple[list[float], list[Tensor]]:
    """One run from the same start; returns the losses and the parameters after it."""
    torch.manual_seed(0)
    size = {"n_embd": options.width, "n_layer": options.layers, "n_head": 4, "n_positions": options.length}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM", **size))
    text = TEXT.read_bytes()
    cut = len(text) * 9 // 10
    losses = Losses()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            bf16=options.bf16,
            eval_strategy="steps",
            eval_steps=max(1, options.steps // 2),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data = {
            "train_dataset": Bytes(text[:cut], options.length),
            "eval_dataset": Bytes(text[cut:], options.length),
        }
        Trainer(model, arguments, callbacks=[losses, *callbacks], **data).train()
    return losses.seen, [p.detach() for p in model.parameters()]


def main() -> None:
    """Train within the budget, and compare if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="60%", help="of what eager needs, or bytes such as 2GiB")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--bf16", action="store_true", help="under bf16 autocast")
    parser.add_argument("--check", action="store_true", help="compare with training without a plan, bit for bit")
    for name, default in {"layers": 4, "width": 128, "length": 128, "batch": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    losses, parameters = train(options, CheckpointPlannerCallback(options.budget, on_plan=print))
    print("losses", " ".join(f"{loss:.4f}" for loss in losses))
    if options.check:
        plain_losses, plain = train(options)
        equal = losses == plain_losses and all(torch.equal(a, b) for a, b in zip(parameters, plain, strict=True))
        print("equal to training without a plan", equal)


if __name__ == "__main__":
    main()
