"""Plan in one process, train in another: the plan is a file, and every process that reads it decides the same.

    python examples/export_and_apply.py plan plan.json      # makes the plan; needs no memory for activations
    python examples/export_and_apply.py train plan.json     # another process, another day, another machine
    python examples/export_and_apply.py both plan.json      # one after the other, in two processes

The training process checks that the plan is for this model, runs some steps, and compares each loss with plain PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys

import torch
from torch import nn

from planner import Plan, measure_step, plan, rewrite


class Net(nn.Module):
    """Residual blocks with dropout, which returns its loss."""

    def __init__(self, width: int = 128, blocks: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))
            for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mean square of the last block's output."""
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def build() -> tuple[Net, torch.Tensor]:
    """The same model and batch in every process."""
    torch.manual_seed(0)
    return Net().train(), torch.randn(256, 128)


def make(path: str) -> None:
    """Decide, and write the decision."""
    model, batch = build()
    made = plan(model, "60%", (batch,), gradient_accumulation=False, time_limit_seconds=20)
    made.save(path)
    print(f"{path}: peak {made.predicted_peak_bytes:,} bytes, overhead {made.overhead:.2%}")


def train(path: str, steps: int = 3) -> None:
    """Apply a plan that another process made; every loss must be that of plain PyTorch."""
    model, batch = build()
    plain = copy.deepcopy(model)
    made = Plan.load(path)
    rewrite(model, made)
    measured = measure_step(model, batch)
    losses: list[list[float]] = []
    for each in (plain, model):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        losses.append([])
        for _ in range(steps):
            optimizer.zero_grad()
            loss = each(batch)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    print(f"measured peak {measured.peak_bytes:,} of {made.budget_bytes:,} bytes; losses {losses[1]}")
    if losses[0] != losses[1] or measured.peak_bytes > made.budget_bytes:
        raise SystemExit(f"plain PyTorch has the losses {losses[0]}")


def main() -> None:
    """One half, the other, or both in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plan", "train", "both"])
    parser.add_argument("path")
    options = parser.parse_args()
    if options.what == "both":
        for what in ("plan", "train"):
            subprocess.run([sys.executable, __file__, what, options.path], check=True)
    else:
        {"plan": make, "train": train}[options.what](options.path)


if __name__ == "__main__":
    main()
