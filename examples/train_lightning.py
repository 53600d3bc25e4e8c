"""Train a small language model with Lightning within a memory budget.

    python examples/train_lightning.py

The callback plans the module inside of the `LightningModule` at its first training step and prints what it decided.
The text is this repository's license, a token a byte; nothing is downloaded. `--check` trains without the callback,
too, and compares losses and parameters.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from small_gpt import SmallGPT
from torch import Tensor
from torch.utils.data import DataLoader

from planner.lightning_callback import CheckpointPlannerCallback

TEXT = Path(__file__).parents[1] / "LICENSE"


class LanguageModel(LightningModule):
    """`model` returns its loss, so that all of a step is in the budget."""

    def __init__(self, layers: int, width: int, length: int) -> None:
        super().__init__()
        self.model = SmallGPT(layers, width, length=length)
        self.losses: list[Tensor] = []

    def training_step(self, ids: Tensor, batch_index: int) -> Tensor:
        """`ids`: (batch, length) integers."""
        loss = self.model(ids)
        self.log("loss", loss)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, ids: Tensor, batch_index: int) -> None:
        """Runs the plain model."""
        self.losses.append(self.model(ids))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Its state is a line of the budget."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(options: argparse.Namespace, callback: CheckpointPlannerCallback | None) -> list[Tensor]:
    """One run from the same start; returns the losses, and the parameters after it."""
    torch.manual_seed(0)
    model = LanguageModel(options.layers, options.width, options.length)
    tokens = torch.tensor(list(TEXT.read_bytes())) % model.model.head.out_features
    rows = tokens[: len(tokens) // options.length * options.length].view(-1, options.length)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        val_check_interval=max(1, options.steps * options.accumulate // 2),
        limit_val_batches=2,
        num_sanity_val_steps=1,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=1.0,
        precision="bf16-mixed" if options.bf16 else "32-true",
        callbacks=[] if callback is None else [callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(rows[:-16], options.batch), DataLoader(rows[-16:], options.batch))  # type: ignore[arg-type]
    return [*model.losses, *(p.detach() for p in model.parameters())]


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
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    result = train(options, CheckpointPlannerCallback(options.budget, on_plan=print))
    print("losses", " ".join(f"{loss:.4f}" for loss in result if loss.dim() == 0))
    if options.check:
        plain = train(options, None)
        equal = len(result) == len(plain) and all(torch.equal(a, b) for a, b in zip(result, plain, strict=True))
        print("equal to training without a plan", equal)


if __name__ == "__main__":
    main()
