"""The smallest feasible budget: between brute force's answer on tiny graphs, and exact where both sides meet."""

from __future__ import annotations

import math

import pytest

from graph_capture.graph import Graph
from solvers import Moccasin, Schedule, SnapshotRefinement, memory_floor, simulate
from solvers.minimum_budget import minimum_budget
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import EVERYTHING, PLAIN, Features, random_graph, training_chain

SOLVER = SnapshotRefinement(work_limit=2, gap=100.0)


def smallest_feasible(graph: Graph) -> int:
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    budgets = range(memory_floor(graph)[0], peak_bytes + 1)
    return next(b for b in budgets if BruteForce(graph).optimum_seconds(b) < math.inf)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("features", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_around_brute_force(seed: int, features: Features) -> None:
    graph = random_graph(seed, 4, features)
    found = minimum_budget(graph, SOLVER, tolerance=0.0)
    exact = smallest_feasible(graph)
    assert found.lower_bound_bytes <= exact <= found.peak_bytes
    assert simulate(graph, found.schedule).peak_bytes == found.peak_bytes
    assert found.floor_bytes <= found.lower_bound_bytes
    assert found.floor_operator == memory_floor(graph)[1]
    assert found.gap == pytest.approx((found.peak_bytes - found.lower_bound_bytes) / found.peak_bytes)


def test_a_chain_is_solved_at_its_floor() -> None:
    graph = training_chain(30)
    found = minimum_budget(graph, SOLVER)
    assert found.peak_bytes == found.lower_bound_bytes == memory_floor(graph)[0]
    assert (found.gap, found.hit_limit) == (0.0, False)
    assert "every schedule" in found.bound_scope
    assert f"({found.peak_bytes:,} bytes)" in str(found) or f"{found.peak_bytes} bytes" in str(found)


def test_proofs_of_a_restriction_do_not_count() -> None:
    graph = random_graph(3, 5, PLAIN)
    found = minimum_budget(graph, Moccasin(intervals=1), tolerance=0.0)
    assert found.lower_bound_bytes == found.floor_bytes


def test_limits_and_empty_graphs() -> None:
    graph = random_graph(24, 5, PLAIN)
    stopped = minimum_budget(graph, SOLVER, time_limit_seconds=0.0)
    assert (stopped.probes, stopped.hit_limit) == (0, True)
    assert stopped.peak_bytes == simulate(graph, Schedule.store_all(graph)).peak_bytes
    assert minimum_budget(graph, SOLVER, max_probes=2).probes <= 2
    empty = minimum_budget(Graph((), (), {"parameters": 10}))
    assert (empty.peak_bytes, empty.lower_bound_bytes, empty.floor_operator) == (10, 10, None)
