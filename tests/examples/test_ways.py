"""The rivals of the side-by-side benchmark: what they recompute is counted exactly."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))

from side_by_side import Row, losses  # pyright: ignore[reportMissingImports]
from ways import (  # pyright: ignore[reportMissingImports]
    Counter,
    Work,
    blocks_of,
    checkpointed,
    partitioned,
)

ROWS, WIDTH = 8, 16
PRODUCT = 2 * ROWS * WIDTH * WIDTH
"""FLOPs of one layer's matrix product."""


def blocks(count: int = 4) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count)))


def counted(model: nn.Module) -> Work:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with Counter() as counter:
        model(x).sum().backward()
    return counter.total


def test_blocks_are_the_outermost_numbered_modules() -> None:
    model = blocks()
    assert blocks_of(model) == list(model)


def test_a_step_and_its_recomputation_are_counted_to_the_flop() -> None:
    plain = counted(blocks())
    assert plain.flops == 4 * 3 * PRODUCT
    assert (counted(checkpointed(blocks(), 1)) - plain).flops == 4 * PRODUCT
    assert (counted(checkpointed(blocks(), 2)) - plain).flops == 2 * PRODUCT


def test_pytorchs_partitioner_is_counted_and_runs_once() -> None:
    model, x = blocks(), torch.randn(ROWS, WIDTH)
    found = partitioned(model, 0.25, lambda m: m(x).sum().backward())
    assert found.calls == 1
    assert found.recomputed.seconds > 0
    assert found.recomputed.flops % PRODUCT == 0
    gradients = [p.grad for p in model.parameters()]
    plain = blocks()
    plain.load_state_dict(model.state_dict())
    plain(x).sum().backward()
    for mine, parameter in zip(gradients, plain.parameters(), strict=True):
        assert mine is not None
        assert parameter.grad is not None
        assert torch.equal(mine, parameter.grad)


def test_losses_are_listed() -> None:
    model = nn.Linear(1, 1)
    rival = Row("rival", model, 100, Work(10, 1.0), ratio=1.5)
    better = Row("ours at the peak of: rival", model, 99, Work(5, 0.5), against="rival", ratio=1.2)
    worse = Row("ours at the peak of: rival", model, 99, Work(20, 0.5), against="rival", ratio=1.6)
    assert losses([rival, better]) == []
    found = losses([rival, worse])
    assert [text.split(": ")[2].split(" against")[0] for text in found] == [
        "recomputed FLOPs 20",
        "step time ratio 1.6",
    ]
