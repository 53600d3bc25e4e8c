"""A plan holds what the caller's own loss needs, whatever form its gradient arrives in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from planner import measure_step, plan, rewrite

WEIGHT = torch.randn(8, 6400, generator=torch.Generator().manual_seed(0))

ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "an expanded scalar": torch.sum,
    "the output's own strides": lambda y: y.tanh().sum(),
    "transposed": lambda y: (y.t() * WEIGHT).sum(),
    "a part of the output": lambda y: y[:3200].pow(2).sum(),
}
IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "an expanded scalar": torch.sum,
    "contiguous": lambda y: (y.contiguous() ** 2).sum(),
    "flattened": lambda y: y.flatten(1).pow(3).sum(),
}


def _fits_exactly(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
    planned = plan(model, "300%", (x,), loss_fn=loss)
    rewrite(model, planned)
    measured = measure_step(model, x, loss_fn=loss).peak_bytes
    assert planned.first_peak_bytes - 128 <= measured <= planned.first_peak_bytes


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    """AOTAutograd copies a gradient whose memory format is not the output's; the original is there meanwhile."""
    _fits_exactly(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.ones(6400, 8), ROWS[name])


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    """Channels last; autograd's formula of a power holds its temporaries until it is done."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    images = torch.ones(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    _fits_exactly(model, images, IMAGES[name])


class WithLoss(nn.Module):
    """Returns its loss among other things, under a name that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.map(x).tanh()
        return {"objective": y.square().mean(), "y": y}


def test_a_loss_fn_may_only_pick_an_output() -> None:
    model, x = WithLoss(), torch.ones(16, 8)
    model(x)["objective"].backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    planned = plan(model, "300%", (x,), loss_fn=lambda result: result["objective"])
    assert planned.loss.location == "inside the model"
    rewrite(model, planned)
    model(x)["objective"].backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True) if p.grad is not None)
