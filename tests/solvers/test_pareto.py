"""The trade-off curve: monotone whatever the solver does, and everything known is used."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import pytest

from graph_capture.graph import Graph
from solvers import Auto, ChenGreedy, SnapshotRefinement, Status
from solvers.hints import NO_HINTS, Hints, Progress
from solvers.pareto import curve
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.solution import Solution, Solver, memory_floor
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import EVERYTHING, PLAIN, random_graph, training_chain


def budgets_of(graph: Graph, count: int) -> list[int]:
    """Evenly from just below the floor to just above the store-all peak."""
    low = memory_floor(graph)[0] - 1
    high = simulate(graph, Schedule.store_all(graph)).peak_bytes + 1
    return [low + (high - low) * i // (count - 1) for i in range(count)]


@pytest.mark.parametrize(("seed", "features"), [(3, PLAIN), (24, PLAIN), (0, EVERYTHING)])
def test_more_budget_never_costs_more(seed: int, features: object) -> None:
    graph = random_graph(seed, 4, features)  # type: ignore[arg-type]
    points = curve(graph, budgets_of(graph, 12), Auto(work_limit=2, gap=0.0))
    exact = BruteForce(graph)
    for point in points:
        solution = point.solution
        optimum = exact.overhead(point.budget_bytes)
        assert solution.lower_bound <= optimum + 1e-6
        assert solution.overhead >= optimum - 1e-6
        if solution.schedule is not None:
            assert simulate(graph, solution.schedule).peak_bytes <= point.budget_bytes
    overheads = [p.solution.overhead for p in points]
    bounds = [p.solution.lower_bound for p in points]
    assert overheads == sorted(overheads, reverse=True)
    assert bounds == sorted(bounds, reverse=True)
    assert math.isinf(overheads[0])
    assert overheads[-1] == 0.0


def test_a_chain_over_a_fine_grid() -> None:
    graph = training_chain(24)
    points = curve(graph, budgets_of(graph, 20), SnapshotRefinement(work_limit=2, gap=1e-4))
    overheads = [p.solution.overhead for p in points]
    assert overheads == sorted(overheads, reverse=True)
    assert len(set(overheads)) > 6


@dataclass(frozen=True)
class Listening(Solver):
    """Chen's greedy segments, which writes down what it was told."""

    told: list[Hints] = field(default_factory=list)
    name = "listening"

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        self.told.append(hints)
        solution = ChenGreedy().solve(graph, budget_bytes)
        return dataclasses.replace(solution, search_class=SnapshotRefinement().solve(graph, 1 << 60).search_class)


def test_schedules_are_passed_on_and_infeasible_is_said_once() -> None:
    graph = training_chain(12)
    solver = Listening()
    low, *rest = budgets_of(graph, 6)
    points = curve(graph, [low - 1, low, low, *rest], solver)
    assert [p.budget_bytes for p in points] == [low - 1, low, *rest]
    assert len(solver.told) == 6  # one budget is repeated, one is below an infeasible one
    assert not solver.told[0].schedules
    assert solver.told[1].schedules
    assert points[0].solution.status is points[1].solution.status is Status.INFEASIBLE


def test_an_interrupt_ends_the_curve_with_what_there_is() -> None:
    graph = training_chain(12)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    budgets = [peak_bytes, int(0.7 * peak_bytes), int(0.6 * peak_bytes), int(0.5 * peak_bytes)]

    def listen(progress: Progress) -> None:
        if math.isfinite(progress.overhead):
            raise KeyboardInterrupt

    points = curve(graph, budgets, Auto(gap=0.0), listen)
    assert [p.budget_bytes for p in points] == [int(0.7 * peak_bytes), peak_bytes]
    assert points[0].solution.interrupted
