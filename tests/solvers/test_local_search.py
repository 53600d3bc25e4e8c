"""Walks in free order: their memory is the simulator's, and what they find."""

from __future__ import annotations

import math
import subprocess
import sys

import networkx
import numpy as np
import pytest

from graph_capture.graph import Graph
from solvers import LocalSearch, Reordered, Schedule, SearchClass, Status, memory_floor, simulate
from solvers.free_order import kernel, moves
from solvers.free_order.tables import lengths_of, order_of, problem_of, state_of
from solvers.hints import Hints, Progress
from solvers.ordering import reordered
from solvers.precedence import precedence, violation
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import EVERYTHING, PLAIN, random_graph

SEARCH = LocalSearch(move_limit=60_000)


@pytest.mark.parametrize("seed", range(60))
def test_memory_and_price_are_the_simulators(seed: int) -> None:
    graph = random_graph(seed, 6, EVERYTHING if seed % 2 else PLAIN, joint=seed % 3 > 0)
    captured = list(range(len(graph)))
    problem = problem_of(graph, lengths_of(graph, captured))
    state = state_of(graph, problem, captured)
    budget_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes * 9 // 10
    rng = np.array([seed + 1], np.uint64)
    best = np.full_like(state.slots[0], -1)
    for round_number in range(12):
        moves.walk(problem, state, rng, best, 1e18, budget_bytes, 10.0, 50.0, 3 * round_number, True, False)
        order = order_of(state.slots[0])
        assert violation(graph, order) is None
        simulation = simulate(graph, Schedule.from_order(graph, order))
        # the simulator may count less in a few cases that the kernel's docstring names, never more
        assert kernel.peak_of(state.top) >= simulation.peak_bytes
        assert state.cost[0] == pytest.approx(100 * simulation.recomputed_seconds / graph.step_seconds)
        again = state_of(graph, problem_of(graph, lengths_of(graph, order)), order)
        assert kernel.peak_of(again.top) == kernel.peak_of(state.top)


def _free_optimum(graph: Graph, budget_bytes: int) -> float:
    orders = networkx.all_topological_sorts(precedence(graph))
    return min(BruteForce(reordered(graph, order).graph).overhead(budget_bytes) for order in orders)


@pytest.mark.parametrize("seed", [1, 4, 8, 9])
def test_small_graphs_are_solved_to_the_optimum_over_all_orders(seed: int) -> None:
    graph = random_graph(seed, 6, PLAIN, joint=False)
    floor_bytes = memory_floor(graph)[0]
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    for budget_bytes in {floor_bytes, (floor_bytes + peak_bytes) // 2}:
        optimum = _free_optimum(graph, budget_bytes)
        solution = SEARCH.solve(graph, budget_bytes)
        assert solution.search_class is SearchClass.FREE
        assert solution.overhead == (optimum if math.isinf(optimum) else pytest.approx(optimum))
        assert solution.lower_bound == 0.0


def test_hints_are_places_to_start_from() -> None:
    graph = random_graph(24, 8, PLAIN)
    budget_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes * 8 // 10
    first = SEARCH.solve(graph, budget_bytes)
    assert first.schedule is not None
    heard: list[Progress] = []
    again = LocalSearch(move_limit=300).solve(graph, budget_bytes, Hints((first.schedule,), progress=heard.append))
    assert again.overhead <= first.overhead
    assert heard
    assert heard[-1].overhead == again.overhead


def test_what_the_listener_raises_ends_the_solve() -> None:
    graph = random_graph(24, 8, PLAIN)

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SEARCH.solve(graph, memory_floor(graph)[0], Hints(progress=interrupt))


def test_no_time_at_all() -> None:
    graph = random_graph(24, 8, PLAIN)
    for solver in (LocalSearch(time_limit_seconds=0.0), Reordered(time_limit_seconds=0.0)):
        solution = solver.solve(graph, memory_floor(graph)[0])
        assert solution.status in (Status.UNKNOWN, Status.FEASIBLE)
        assert solution.hit_limit


def test_another_order_costs_nothing_where_it_fits() -> None:
    graph = random_graph(9, 30, PLAIN, joint=False)
    captured = simulate(graph, Schedule.store_all(graph)).peak_bytes
    solution = Reordered(work_limit=1).solve(graph, captured - 1)
    if solution.overhead == 0:
        assert solution.status is Status.OPTIMAL
        assert solution.bound_scope == "every schedule, in whatever order"


def test_importing_them_is_light() -> None:
    code = (
        "import sys, solvers.local_search, solvers.reordered, solvers.ordering; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'ortools', 'numba', 'numpy', 'networkx')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
