"""Out of memory in spite of a plan: predicted against actual, and what to raise; the original error chained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from graph_capture.formats import format_bytes
from planner import Plan, plan, rewrite
from solvers.chen import ChenGreedy

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "1073741824 bytes. Error code 12 (Cannot allocate memory)\nmore lines"
)


class Fails(TorchDispatchMode):
    """Raises at the first operator of a name, as an allocator would."""

    def __init__(self, name: str, error: RuntimeError) -> None:
        super().__init__()
        self.name, self.error = name, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.name in str(func):
            raise self.error
        return func(*args, **(kwargs or {}))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 16))


def inputs() -> torch.Tensor:
    return torch.linspace(-1, 1, 128).reshape(8, 16)


@pytest.fixture
def planned() -> tuple[nn.Module, Plan]:
    made = plan(model(), "100%", (inputs(),), loss_fn=torch.sum, solver=ChenGreedy())
    rewritten = rewrite(model(), made, on_change="error")
    rewritten(inputs()).sum().backward()
    return rewritten, made


def failure(rewritten: nn.Module, name: str, error: RuntimeError) -> torch.OutOfMemoryError:
    with pytest.raises(torch.OutOfMemoryError, match="in spite of the plan") as caught, Fails(name, error):
        rewritten(inputs()).sum().backward()
    assert caught.value.__cause__ is error
    return caught.value


def test_forward_on_the_cpu(planned: tuple[nn.Module, Plan]) -> None:
    rewritten, made = planned
    text = str(failure(rewritten, "aten.sigmoid", RuntimeError(ALLOCATOR)))
    assert "in the forward at aten.sigmoid_.default (3, " in text
    assert f"predicted peak {format_bytes(made.predicted_peak_bytes)}, budget {format_bytes(made.budget_bytes)}" in text
    assert "extra_bytes=" in text
    assert "you tried to allocate 1073741824 bytes" in text
    assert "more lines" not in text


def test_backward_of_a_slice(planned: tuple[nn.Module, Plan]) -> None:
    text = str(failure(planned[0], "tanh_backward", RuntimeError(ALLOCATOR)))
    assert "in the backward at aten.tanh_backward.default (1" in text


@pytest.mark.parametrize(
    ("beyond", "words"),
    [(5_000, "5,000"), (-5_000, "Raise the headroom, extra_bytes={'headroom': ...}, by at least 7")],
)
def test_on_a_card(planned: tuple[nn.Module, Plan], monkeypatch: pytest.MonkeyPatch, beyond: int, words: str) -> None:
    rewritten, made = planned
    allocated = made.predicted_peak_bytes + beyond
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: allocated + 7)
    text = str(failure(rewritten, "tanh_backward", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")))
    assert f"actually allocated {format_bytes(allocated)} at most" in text
    assert words in text
    assert "CUDA out of memory. Tried to allocate" in text


def test_the_model_still_trains_afterwards(planned: tuple[nn.Module, Plan]) -> None:
    rewritten, _ = planned
    failure(rewritten, "tanh_backward", RuntimeError(ALLOCATOR))
    rewritten.zero_grad()
    rewritten(inputs()).sum().backward()
    plain = model()
    plain(inputs()).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), rewritten.parameters(), strict=True))


def test_other_errors_stay_as_they_are(planned: tuple[nn.Module, Plan]) -> None:
    error = RuntimeError("another thing")
    with pytest.raises(RuntimeError, match="another thing") as caught, Fails("tanh_backward", error):
        planned[0](inputs()).sum().backward()
    assert caught.value is error
