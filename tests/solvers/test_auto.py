"""What Auto picks, what it says about it, and that naming a solver is all that imports it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

import solvers
from graph_capture.graph import Graph
from solvers import (
    Auto,
    Checkmate,
    ChenGreedy,
    Revolve,
    Schedule,
    SearchClass,
    SnapshotRefinement,
    Status,
    StoreAll,
    memory_floor,
    simulate,
)
from solvers.auto import CHECKMATE_OPERATORS, CHECKMATE_OPERATORS_BY_WORK, CHECKMATE_SHARE
from tests.solvers.random_graphs import PLAIN, random_graph, training_chain

GRAPH = training_chain(12)
PEAK_BYTES = simulate(GRAPH, Schedule.store_all(GRAPH)).peak_bytes


def test_selects_store_all_where_it_fits() -> None:
    solver, reason = Auto().select(GRAPH, PEAK_BYTES)
    assert solver == StoreAll()
    assert "fits" in reason


def test_selects_refinement_with_its_own_options() -> None:
    solver, reason = Auto(time_limit_seconds=5.0, gap=0.01, seed=3, work_limit=7).select(GRAPH, PEAK_BYTES - 1)
    share = 1.0 - CHECKMATE_SHARE  # the rest of the time is Checkmate's on so small a graph
    assert solver == SnapshotRefinement(time_limit_seconds=share * 5.0, gap=0.01, seed=3, work_limit=7)
    assert f"{PEAK_BYTES:,} bytes" in reason


def test_says_what_cannot_work() -> None:
    floor_bytes, operator = memory_floor(GRAPH)
    solution = Auto().solve(GRAPH, floor_bytes - 1)
    assert solution.status is Status.INFEASIBLE
    assert solution.floor_operator == operator
    assert GRAPH.operators[operator].name in solution.message
    segments = ChenGreedy().solve(GRAPH, floor_bytes - 1)
    assert solution.smallest_known_budget_bytes == segments.smallest_known_budget_bytes


def test_says_whose_the_schedule_and_the_bound_are() -> None:
    solution = Auto(work_limit=3).solve(GRAPH, PEAK_BYTES * 3 // 4)
    assert solution.schedule is not None
    assert solution.solver == "auto"
    assert solution.search_class is SearchClass.MIXED
    assert solution.schedule_by
    assert solution.bound_by == "snapshot (relaxation)"
    assert f"schedule by {solution.schedule_by}, bound by snapshot" in solution.message
    assert "captured order" in solution.bound_scope


def test_segments_are_the_safety_net(monkeypatch: pytest.MonkeyPatch) -> None:
    import math

    def nothing(self: SnapshotRefinement, graph: object, budget_bytes: int, hints: object = None) -> solvers.Solution:
        found = StoreAll().solve(GRAPH, 0)
        return dataclasses.replace(found, solver="snapshot", status=Status.UNKNOWN, lower_bound=0.05, overhead=math.inf)

    monkeypatch.setattr(SnapshotRefinement, "solve", nothing)
    monkeypatch.setattr(Checkmate, "solve", nothing)
    solution = Auto().solve(GRAPH, PEAK_BYTES * 7 // 10)
    assert solution.schedule is not None
    assert solution.status is Status.FEASIBLE
    assert solution.lower_bound == 0.05
    assert "schedule by chen-greedy, bound by snapshot" in solution.message


def test_import_is_light() -> None:
    code = "import sys, solvers; print(sorted({'torch', 'ortools', 'numba', 'numpy', 'networkx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    for name in solvers.__all__:
        assert getattr(solvers, name) is not None
    assert set(dir(solvers)) == set(solvers.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Oracle'"):
        _ = solvers.Oracle  # type: ignore[attr-defined]


def test_a_work_limit_gives_the_same_plan_every_time() -> None:
    """Whatever else the machine does meanwhile: nothing depends on the clock."""
    graph = random_graph(3, 14, PLAIN)
    budget = int(0.6 * simulate(graph, Schedule.store_all(graph)).peak_bytes)
    first, second = (Auto(work_limit=2, seed=1, gap=0.0).solve(graph, budget) for _ in range(2))
    assert first.schedule == second.schedule
    assert (first.overhead, first.lower_bound, first.message) == (second.overhead, second.lower_bound, second.message)


@pytest.mark.parametrize("graph", [GRAPH, random_graph(3, 14, PLAIN)], ids=["chain", "random"])
def test_more_budget_never_costs_more(graph: Graph) -> None:
    """Over a fine grid: up to the gap that was asked for, which is nothing here; a curve is monotone by its making."""
    floor_bytes, _ = memory_floor(graph)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    budgets = range(floor_bytes, peak_bytes + 1, max(1, (peak_bytes - floor_bytes) // 20))
    overheads = [Auto(work_limit=1, gap=0.0).solve(graph, budget_bytes).overhead for budget_bytes in budgets]
    assert len(overheads) >= 20
    assert overheads == sorted(overheads, reverse=True)


def test_the_best_of_everything_is_never_worse_than_the_parts() -> None:
    graph = random_graph(7, 10, PLAIN)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    for share in (0.75,):
        budget = int(share * peak_bytes)
        found = Auto(time_limit_seconds=8.0, work_limit=3, gap=0.0).solve(graph, budget)
        for part in (ChenGreedy(), Revolve(), Checkmate(time_limit_seconds=10.0)):
            assert found.overhead <= part.solve(graph, budget).overhead + 1e-9


def test_under_a_work_limit_checkmate_is_asked_about_small_graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program counts nodes, and a large one's first node takes as long as the clock lets it."""
    asked: list[int] = []

    def open_gap(self: object, graph: Graph, budget_bytes: int, hints: object = None) -> solvers.Solution:
        found = ChenGreedy().solve(graph, budget_bytes)
        return dataclasses.replace(found, solver="snapshot", lower_bound=0.0)

    def ask(self: object, graph: Graph, budget_bytes: int, hints: object = None) -> solvers.Solution:
        asked.append(len(graph))
        return StoreAll().solve(graph, budget_bytes)

    monkeypatch.setattr(SnapshotRefinement, "solve", open_gap)
    monkeypatch.setattr(Checkmate, "solve", ask)
    small, large = training_chain(12), training_chain(24)
    assert len(small) <= CHECKMATE_OPERATORS_BY_WORK < len(large) <= CHECKMATE_OPERATORS
    for graph in (small, large):
        budget_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes * 7 // 10
        assert Auto(work_limit=1).solve(graph, budget_bytes).schedule is not None
        assert Auto().solve(graph, budget_bytes).schedule is not None
    assert asked == [len(small), len(small), len(large)]
