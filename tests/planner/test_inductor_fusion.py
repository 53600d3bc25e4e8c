"""Inductor fuses within the schedule: no kernel holds what the schedule has let go."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import fx, nn
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import CompiledFxGraph
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from graph_capture.allocator import AllocatorTrace
from planner import plan, rewrite
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


def compiled_from(program: Program, dying: int) -> tuple[Callable[..., tuple[torch.Tensor, ...]], int]:
    """A compiled program, of whose inputs the first `dying` are nobody else's, and how many inputs it has."""
    traced = fx.symbolic_trace(program)
    graph = traced.graph
    (output,) = graph.find_nodes(op="output")
    output.args = (tuple(output.args[0]),)
    placeholders = graph.find_nodes(op="placeholder")
    mode = FakeTensorMode()
    for i, node in enumerate(placeholders):
        with mode:
            node.meta = {"val": torch.empty(SIZE), DIES: i < dying}
    return compile_program(traced, backward=True), len(placeholders)


def peak_bytes(program: Program, dying: int) -> int:
    """Peak above the inputs, of which the first `dying` are nobody else's; what it returns is checked."""
    compiled, count = compiled_from(program, dying)
    inputs = [torch.randn(SIZE) for _ in range(count)]
    for given, expected in zip(compiled(list(inputs)), program(*inputs), strict=True):
        torch.testing.assert_close(given, expected)
    with AllocatorTrace(collect=True) as trace:  # it sees the release of what was allocated after its start alone
        arguments = [torch.randn(SIZE) for _ in range(count)]
        held = arguments[dying:]
        compiled(arguments)
    assert len(held) == count - dying
    return trace.peak_bytes - BYTES * count


@pytest.fixture
def codes() -> Iterator[list[str]]:
    """The Python code of each program that is compiled."""
    found: list[str] = []
    with (
        config.patch(force_disable_caches=True),
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(found.append)),
    ):
        yield found


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


def standardised(x: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As the backward of a normalisation: two sums, what is computed from them and both inputs, and one sum once more.

    The last sum shares a kernel with the first ones, and so runs before the second operator, which stands before it.
    """
    ops = torch.ops.aten
    total, moved = ops.sum.dim_IntList(gradient, [0]), ops.mul.Tensor(gradient, x)
    scaled = ops.sum.dim_IntList(moved, [0])
    made = ops.sub.Tensor(gradient, ops.mul.Tensor(ops.add.Tensor(x, total), scaled))
    return made, ops.mul.Tensor(scaled, 2.0), total


@needs_compiler
def test_a_function_goes_on_while_its_inputs_are_read(codes: list[str]) -> None:
    """What a later kernel of the same function reads is not let go before it, wherever it stood in the schedule."""
    compiled, count = compiled_from(standardised, dying=2)
    inputs = [torch.randn(SIZE) for _ in range(count)]
    for given, expected in zip(compiled(list(inputs)), standardised(*inputs), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    (code,) = codes
    assert code.count("async_compile.cpp_pybinding(") == 1


@needs_compiler
def test_a_compiled_graph_is_called_directly_after_its_first_call() -> None:
    compiled, count = compiled_from(passing, dying=0)
    inputs = [torch.randn(SIZE) for _ in range(count)]
    first = compiled(list(inputs))
    with mock.patch.object(CompiledFxGraph, "__call__", side_effect=AssertionError("not directly")):
        assert torch.equal(compiled(list(inputs))[0], first[0])
    with profile(activities=[ProfilerActivity.CPU]) as record:
        compiled(list(inputs))
    assert any("CompiledFxGraph" in event.name for event in record.events() or ())  # a profiler sees its name


class _Strided(nn.Module):
    """Convolutions, normalisation and a halved plane; returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 2, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            nn.ConvTranspose2d(16, 8, 2, stride=2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).square().mean()


@needs_compiler
def test_a_model_in_channels_last_stays_so(codes: list[str]) -> None:
    """Nothing that passes from one program to the next, or to a convolution, is brought into another layout."""
    x = torch.randn(2, 3, 8, 12).to(memory_format=torch.channels_last)
    model = _Strided().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rewrite(model, plan(model, "1GiB", (x,), compiler="inductor"))
    model(x).backward()
    assert len(codes) > 2
    found = re.findall(r"\((\d+), (\d+), (\d+), (\d+)\), \(\d+, (\d+), \d+, (\d+)\)", "".join(codes))
    planes = [tuple(map(int, numbers)) for numbers in found if "1" not in numbers[:4]]
    assert planes
    assert all((across, within) == (1, channels) for _, channels, _, _, across, within in planes)
