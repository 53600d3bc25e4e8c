"""Views of several pieces (``split``) whose pieces are read by different slices of the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from graph_capture.build import build_graph
from graph_capture.costs import FlopCount
from graph_capture.workspace import NoWorkspace
from planner import plan, rewrite
from planner.emit import emit
from planner.slices import boxed, cut
from solvers.schedule import Schedule
from tests.graph_capture.captured import joint_of
from tests.planner.stress import RecomputeAlways


class Halves(nn.Module):
    """The backward reads the second half before the second layer's gradient is handed over, the first half after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4) to a scalar."""
        a, b = self.first(x).split(4, 1)
        return self.third(self.second(a.sin()) * b.sin()).square().sum()


def test_only_tensors_pass_from_slice_to_slice() -> None:
    joint = joint_of(Halves(), torch.randn(3, 4))
    graph, binding = build_graph(joint, FlopCount(), NoWorkspace())
    programs = emit(graph, binding, Schedule.from_order(graph, list(range(len(graph)))), traceable=True)
    splits = programs.backward.graph.find_nodes(op="call_function", target=torch.ops.aten.split.Tensor)
    assert splits, "the backward should make the halves again"
    passed: list[Any] = []

    def compile_module(module: fx.GraphModule) -> Any:
        outputs = next(iter(module.graph.find_nodes(op="output"))).args[0]
        passed.extend(o.meta["val"] for o in outputs if isinstance(o, fx.Node))  # type: ignore[union-attr]
        return boxed(module)

    assert len(cut(programs, compile_module)) > 2
    assert all(isinstance(value, Tensor) for value in passed)


def test_the_halves_train_as_before() -> None:
    torch.manual_seed(0)
    plain, x = Halves(), torch.randn(3, 4)
    model = Halves()
    model.load_state_dict(plain.state_dict())
    rewrite(model, plan(model, "1GiB", (x,), solver=RecomputeAlways()))
    plain(x).backward()
    model(x).backward()
    for mine, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert expected.grad is not None
        assert torch.equal(mine.grad, expected.grad)
