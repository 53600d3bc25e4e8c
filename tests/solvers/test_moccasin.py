"""Bartan et al. 2023: equal to the staged optimum where the classes coincide, never below it, and deterministic."""

from __future__ import annotations

import subprocess
import sys

import pytest

from solvers import Checkmate, Moccasin, Schedule, SearchClass, Status, memory_floor, simulate
from solvers.interval_model import event
from tests.solvers.brute_force import BruteForce, budgets_of
from tests.solvers.random_graphs import EVERYTHING, PLAIN, Features, random_graph, training_chain


def test_events_of_the_staged_timeline() -> None:
    assert [event(i, j) for j in range(3) for i in range(j + 1)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_the_staged_optimum(seed: int) -> None:
    """With plain operators and enough intervals the class is the staged one."""
    graph = random_graph(seed, 5, PLAIN)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    for budget_bytes in budgets_of(graph, memory_floor(graph)[0], peak_bytes)[1:3]:
        solution = Moccasin(intervals=4).solve(graph, budget_bytes)
        optimum = BruteForce(graph, staged=True).overhead(budget_bytes)
        assert solution.overhead == pytest.approx(optimum, abs=1e-6)
        assert solution.status in (Status.OPTIMAL, Status.INFEASIBLE)
        assert solution.search_class is SearchClass.INTERVALS


@pytest.mark.parametrize("features", [PLAIN, Features(workspace=0.4, random_state=0.4, outputs=0.2), EVERYTHING])
def test_never_better_than_checkmate_and_within_the_budget(features: Features) -> None:
    """Whatever an operator can have: a schedule that the program believes to fit does fit in the simulator."""
    for seed in range(12):
        graph = random_graph(100 + seed, 6, features)
        budget_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes * 9 // 10
        solution = Moccasin(time_limit_seconds=10.0).solve(graph, budget_bytes)
        assert solution.status in (Status.OPTIMAL, Status.INFEASIBLE)
        assert solution.overhead >= Checkmate().solve(graph, budget_bytes).overhead - 1e-6


def test_one_interval_is_store_all() -> None:
    graph = training_chain(5)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    solution = Moccasin(intervals=1).solve(graph, peak_bytes - 1)
    assert solution.status is Status.INFEASIBLE
    assert "no schedule of 1 intervals" in solution.message


def test_more_intervals_cost_no_more() -> None:
    graph = training_chain(8)
    budget_bytes = 50
    overheads = [Moccasin(intervals=c).solve(graph, budget_bytes).overhead for c in (2, 3)]
    assert overheads[1] <= overheads[0]


def test_large_bytes_are_rounded_up() -> None:
    graph = training_chain(6, size_bytes=10**10 + 7)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    solution = Moccasin().solve(graph, peak_bytes * 9 // 10)
    assert solution.schedule is not None
    assert simulate(graph, solution.schedule).peak_bytes <= peak_bytes * 9 // 10


def test_limits() -> None:
    graph = training_chain(12)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    stopped = Moccasin(time_limit_seconds=0.0).solve(graph, peak_bytes // 2)
    assert (stopped.status, stopped.hit_limit) == (Status.UNKNOWN, True)
    first, second = (Moccasin(work_limit=0.5).solve(graph, peak_bytes // 2) for _ in range(2))
    assert (first.schedule, first.lower_bound) == (second.schedule, second.lower_bound)
    refused = Moccasin(max_operators=3).solve(graph, peak_bytes // 2)
    assert refused.status is Status.NOT_APPLICABLE
    assert "24 operators are too many" in refused.message
    with pytest.raises(ValueError, match="intervals is 0; it must be at least 1"):
        Moccasin(intervals=0)


def test_import_is_light() -> None:
    code = "import sys, solvers.moccasin; print({'torch', 'ortools', 'numpy', 'networkx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
