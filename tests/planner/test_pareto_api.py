"""``pareto`` and ``minimum_budget``: one capture, points in order, plans that run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graph_capture.graph import Graph
from planner import InfeasibleBudgetError, InvalidPlanError, Pareto, minimum_budget, pareto, plan, rewrite
from solvers import Auto, ChenGreedy, Progress, SnapshotRefinement
from solvers.hints import NO_HINTS, Hints
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.solution import Solution
from solvers.store_all import StoreAll
from tests.models import Perceptron, features
from tests.solvers.random_graphs import training_chain


def step(scores: torch.Tensor) -> torch.Tensor:
    return scores.square().mean()


@pytest.fixture(scope="module")
def found() -> Pareto:
    budgets = ["100%", "80%", "60%", "20 KB", "80%"]
    return pareto(Perceptron(), budgets, (features(),), loss_fn=step, solver=Auto(work_limit=2))


def test_points_ascend_and_overheads_fall(found: Pareto) -> None:
    budgets = [point.budget_bytes for point in found.points]
    assert budgets == sorted(set(budgets))
    assert len(budgets) == 4
    overheads = [point.overhead for point in found.points]
    assert overheads == sorted(overheads, reverse=True)
    assert found.points[-1].requested == "100%"
    assert found.points[-1].budget_bytes == found.eager_peak_bytes
    for point in found.points:
        assert point.predicted_peak_bytes <= point.budget_bytes
        assert point.lower_bound <= point.overhead


def test_a_curve_is_printed_as_a_table(found: Pareto) -> None:
    head, *rows = str(found).splitlines()
    assert head.split()[:3] == ["budget", "peak", "overhead"]
    assert len(rows) == len(found.points)
    assert "infeasible" in rows[0]
    assert "optimal" in rows[-1]


def test_a_point_is_a_plan(found: Pareto) -> None:
    torch.manual_seed(0)
    model = Perceptron()
    index = next(i for i, point in enumerate(found.points) if point.requested == "80%")
    chosen = found.plan(index)
    assert chosen.budget_bytes == found.points[index].budget_bytes
    assert chosen.overhead == pytest.approx(found.points[index].overhead)
    x = features()
    torch.manual_seed(1)
    step(model(x)).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    rewritten = rewrite(model, chosen)
    torch.manual_seed(1)
    step(rewritten(x)).backward()
    for parameter, gradient in zip(rewritten.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient)


def test_what_cannot_be_is_a_point_and_no_plan(found: Pareto) -> None:
    assert found.points[0].status == "INFEASIBLE"
    with pytest.raises(InfeasibleBudgetError):
        found.plan(0)


def test_a_graph_has_a_curve_and_no_plan() -> None:
    graph = training_chain(10)
    curve = pareto(graph, ["100%", "70%"], solver=ChenGreedy())
    assert curve.points[-1].overhead == 0.0
    with pytest.raises(ValueError, match="made from a graph"):
        curve.plan(0)


def test_the_smallest_budget_is_one_that_plan_takes() -> None:
    model = Perceptron()
    # Rounds of work in the place of seconds: a busy machine finds what an idle one does.
    looks = SnapshotRefinement(600.0, gap=100.0, work_limit=2)
    smallest = minimum_budget(model, (features(),), loss_fn=step, solver=looks, time_limit_seconds=600.0)
    assert smallest.lower_bound_bytes <= smallest.peak_bytes
    made = plan(
        model,
        smallest.peak_bytes,
        (features(),),
        loss_fn=step,
        solver=Auto(work_limit=1, time_limit_seconds=1.0),
        start=smallest.schedule,
    )
    assert made.predicted_peak_bytes <= smallest.peak_bytes
    assert made.overhead <= smallest.overhead


def test_a_start_of_another_model_is_refused() -> None:
    model = Perceptron()
    foreign = plan(nn.Sequential(nn.Linear(8, 8)), "200%", (torch.ones(4, 8),), loss_fn=torch.sum)
    with pytest.raises(InvalidPlanError, match="`start` is no schedule of this training step"):
        plan(model, "75%", (features(),), loss_fn=step, start=foreign)


def test_a_file_name_is_no_start() -> None:
    with pytest.raises(InvalidPlanError, match=r"`start` is 'p.json', neither a Plan nor a Schedule"):
        plan(Perceptron(), "75%", (features(),), loss_fn=step, start="p.json")  # type: ignore[arg-type]


def test_a_curve_and_the_smallest_budget_start_from_a_schedule() -> None:
    graph = training_chain(10)
    store_all = simulate(graph, Schedule.store_all(graph)).peak_bytes
    known = ChenGreedy().solve(graph, store_all * 7 // 10).schedule
    assert known is not None
    peak = simulate(graph, known).peak_bytes
    seen: list[tuple[Schedule, ...]] = []

    class Noting(StoreAll):
        def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
            seen.append(hints.schedules)
            return super().solve(graph, budget_bytes, hints)

    pareto(graph, ["90%", "100%"], solver=Noting(), start=known)
    assert [known in schedules for schedules in seen] == [True, True]
    assert minimum_budget(graph, solver=StoreAll(), time_limit_seconds=60.0, start=known).peak_bytes <= peak


def test_progress_is_told() -> None:
    told: list[Progress] = []
    plan(Perceptron(), "75%", (features(),), loss_fn=step, solver=Auto(work_limit=1), progress=told.append)
    assert told
    assert all(p.solver and p.stage and p.seconds >= 0.0 for p in told)
