"""Weights used more than once under autocast: gradients equal to eager's bit for bit, whose cache casts them once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import auto_checkpoint


class Shared(nn.Module):
    """One weight in several linear layers; `body` says how it is used."""

    def __init__(self, body: Callable[[Shared, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(48, 48), nn.Linear(48, 48)
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self, x)).float().pow(2).mean()


def three_uses(m: Shared, x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = torch.relu(m.linear(x))
    return x


def also_in_float32(m: Shared, x: torch.Tensor) -> torch.Tensor:
    x = F.embedding(torch.arange(32) % 48, m.linear.weight) + x  # as tied embeddings are
    x = three_uses(m, x)
    return x + torch.cumsum(m.linear.weight, 0)[:32]


def also_cast_by_hand(m: Shared, x: torch.Tensor) -> torch.Tensor:
    x = torch.relu(m.linear(x)) @ m.linear.weight.to(torch.bfloat16)
    return torch.relu(m.linear(x)) @ m.linear.weight.bfloat16()


def also_as_a_view(m: Shared, x: torch.Tensor) -> torch.Tensor:
    return m.linear(m.linear(x)) @ m.linear.weight.t() @ m.linear.weight


def in_two_blocks(m: Shared, x: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            x = m.linear(m.linear(x))
    return x.float()


def partly_without_cache(m: Shared, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        x = m.linear(m.linear(x))
    return m.linear(m.linear(x))


def one_use_without_loss(m: Shared, x: torch.Tensor) -> torch.Tensor:
    m.linear(x)
    return m.linear(m.linear(x).detach()) + m.linear(x)


BODIES = [
    three_uses,
    also_in_float32,
    also_cast_by_hand,
    also_as_a_view,
    in_two_blocks,
    partly_without_cache,
    one_use_without_loss,
]


def gradients(model: nn.Module, x: torch.Tensor, outside: Callable[[], Any]) -> list[Any]:
    model.zero_grad()
    with outside():
        loss = model(x)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), x.grad]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("cache", [True, False, None], ids=["cache", "no cache", "no autocast outside"])
def test_gradients_are_those_of_eager(body: Callable[..., Any], cache: bool | None) -> None:
    if cache is None and body in (also_cast_by_hand, partly_without_cache):
        pytest.skip("its dtypes differ without autocast around it")

    def outside() -> Any:
        if cache is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=cache)

    torch.manual_seed(0)
    model = Shared(body)
    planned = auto_checkpoint(copy.deepcopy(model), "100%")
    x = torch.randn(32, 48)
    expected = gradients(model, x, outside)
    for _ in range(2):
        for ours, theirs in zip(gradients(planned, x, outside), expected, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("leaf", [True, False])
def test_an_input_that_is_used_twice(leaf: bool) -> None:
    torch.manual_seed(0)

    def body(m: Shared, x: torch.Tensor) -> torch.Tensor:
        return m.linear(x) * m.last(x)

    model = Shared(body)
    planned = auto_checkpoint(copy.deepcopy(model), "100%")
    found = []
    for each in (model, planned):
        source = torch.randn(32, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = each(source if leaf else source * 1.5)
        loss.backward()
        found.append(source.grad)
    assert torch.equal(found[0], found[1])
