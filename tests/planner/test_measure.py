"""`measure_step`: exact bytes, and nothing left behind."""

from __future__ import annotations

import torch
from torch import nn

from planner import measure_step
from tests.models import MODELS


class Known(nn.Module):
    """A step whose memory can be added up by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum()


def test_the_peak_of_a_step_that_can_be_added_up() -> None:
    x = torch.ones(1000)
    first = measure_step(Known(), x)
    # Forward: the product. Backward: the expanded gradient times x is the weight's gradient; two scalars beside it.
    assert first.resident_bytes == 8000
    assert 8000 + 4000 < first.peak_bytes <= 8000 + 4000 + 16
    later = measure_step(Known(), x, gradient_accumulation=True)
    assert later.resident_bytes == 12_000
    assert later.peak_bytes == first.peak_bytes + 4000
    assert first.loss == 1000.0
    assert first.exact


def test_nothing_is_left_behind() -> None:
    given = MODELS["resnet"]()
    model = given.model
    parameter = next(model.parameters())
    parameter.grad = torch.full_like(parameter, 3.0)
    kept = parameter.grad
    buffers = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    measure_step(model, *given.args, loss_fn=given.loss_fn, repeats=2, **given.kwargs)
    assert parameter.grad is kept
    assert bool((kept == 3.0).all())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
