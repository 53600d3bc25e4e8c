"""Inductor fuses within the schedule: no kernel holds what the schedule has let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import fx
from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode

from graph_capture.allocator import AllocatorTrace
from planner.inductor import compile_program
from planner.slices import DIES
from tests.planner.test_inductor import needs_compiler

SIZE = (64, 128)
BYTES = 64 * 128 * 4
Program = Callable[..., tuple[torch.Tensor, ...]]


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    with config.patch(compile_threads=1):
        yield


def peak_bytes(program: Program, dying: int) -> int:
    """Peak above the inputs, of which the first `dying` are nobody else's; what it returns is checked."""
    traced = fx.symbolic_trace(program)
    graph = traced.graph
    (output,) = graph.find_nodes(op="output")
    output.args = (tuple(output.args[0]),)
    placeholders = graph.find_nodes(op="placeholder")
    mode = FakeTensorMode()
    for i, node in enumerate(placeholders):
        with mode:
            node.meta = {"val": torch.empty(SIZE), DIES: i < dying}
    compiled = compile_program(traced, backward=True)
    inputs = [torch.randn(SIZE) for _ in placeholders]
    for given, expected in zip(compiled(list(inputs)), program(*inputs), strict=True):
        torch.testing.assert_close(given, expected)
    with AllocatorTrace(collect=True) as trace:  # it sees the release of what was allocated after its start alone
        arguments = [torch.randn(SIZE) for _ in placeholders]
        held = arguments[dying:]
        compiled(arguments)
    assert len(held) == len(placeholders) - dying
    return trace.peak_bytes - BYTES * len(placeholders)


def joined(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The second operator reads the first one's result, which is returned: fused, both results lie beside a and b."""
    first = torch.ops.aten.add.Tensor(a, b)
    return first, torch.ops.aten.mul.Tensor(first, c)


def separate(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Two operators that share nothing: two loops, which Inductor writes into one C++ function."""
    return torch.ops.aten.add.Tensor(a, b), torch.ops.aten.exp.default(c)


def passing(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The first result is read by the second operator alone: fused, it is never made."""
    return (torch.ops.aten.mul.Tensor(torch.ops.aten.add.Tensor(a, b), c),)


@needs_compiler
@pytest.mark.parametrize("program", [joined, separate])
@pytest.mark.parametrize("dying", [2, 0])
def test_what_dies_is_let_go_before_the_next_result_is_made(program: Program, dying: int) -> None:
    assert peak_bytes(program, dying) == (BYTES if dying else 2 * BYTES)


@needs_compiler
def test_what_is_read_in_passing_is_never_made() -> None:
    assert peak_bytes(passing, dying=2) == BYTES
