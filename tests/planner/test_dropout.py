"""Dropout rounds as in eager, in every dtype and at probabilities whose `1 / (1 - p)` is not exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from planner import plan, rewrite
from planner.dropout import dropout_as_in_eager
from tests.planner.stress import RecomputeAlways


class Drops(nn.Module):
    """Three dropouts among what is recomputed."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.dropout = nn.Dropout(probability)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.dropout(torch.tanh(layer(x)))
        return x.float().square().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("probability", [0.1, 0.3, 0.76])
def test_results_and_gradients_are_eagers(dtype: torch.dtype, probability: float) -> None:
    torch.manual_seed(0)
    plain = Drops(probability).to(dtype)
    planned = copy.deepcopy(plain)
    x = torch.randn(32, 16, dtype=dtype)
    made = plan(planned, "1GiB", (x,), solver=RecomputeAlways())
    assert made.overhead > 0
    rewrite(planned, made)
    for _ in range(2):  # the second step accumulates
        losses = []
        for model in (plain, planned):
            torch.manual_seed(1)
            losses.append(model(x))
            losses[-1].backward()
        assert torch.equal(*losses)
        for one, other in zip(plain.parameters(), planned.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("probability", [k / 100 for k in range(1, 100, 7)])
def test_the_same_random_numbers(probability: float) -> None:
    x = torch.randn(7, 41)
    torch.manual_seed(3)
    expected = torch.dropout(x, probability, True)
    torch.manual_seed(3)
    given, mask = dropout_as_in_eager(x, probability, True)
    assert torch.equal(given, expected)
    assert torch.equal(mask, expected != 0)


@pytest.mark.parametrize("fused", [True, False], ids=["flash", "math"])
def test_attention_under_autocast(fused: bool) -> None:
    """The backward runs outside of autocast, whatever was cast in the forward."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.skip = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in self.qkv(x).split(16, 2))
            dropped = 0.0 if fused else 0.1
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True)
            return self.out(mixed.transpose(1, 2).flatten(2) + self.skip(x)).square().mean()

    torch.manual_seed(0)
    plain = Attends()
    planned = copy.deepcopy(plain)
    x = torch.randn(4, 12, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rewrite(planned, plan(planned, "1GiB", (x,), solver=RecomputeAlways()))
    for model in (plain, planned):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x)
        loss.backward()
    for one, other in zip(plain.parameters(), planned.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
