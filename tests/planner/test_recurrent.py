"""Recurrent networks: captured one step after another, where eager runs one kernel; the same up to rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner import plan, rewrite
from tests.planner.stress import RecomputeAlways

WIDTH = 6


class Network(nn.Module):
    """A recurrent network and the mean square of its output."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.network = kind(WIDTH, WIDTH, 2, dropout=0.4, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0].square().mean()


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(2)
    loss = module(x)
    loss.backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "next random number": torch.rand(()), **gradients}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bidirectional": True}], ids=["plain", "bidirectional"])
def test_dropout_between_layers_is_eagers(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    plain, x = Network(kind, **options), torch.randn(3, 4, WIDTH)
    planned = copy.deepcopy(plain)
    made = plan(planned, "1GiB", (x,), solver=RecomputeAlways())
    rewrite(planned, made)
    assert any(o.random_state_bytes for o in made.to_graph().operators)
    expected, given = step(plain, x), step(planned, x)
    assert given.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(given[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
