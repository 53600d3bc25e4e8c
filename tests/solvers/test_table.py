"""One table of (solver, graphs where it applies) and one suite that every solver passes: a new solver is one row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from graph_capture.graph import Graph, Operator, Value
from solvers import (
    SOLVERS,
    Auto,
    Checkmate,
    CheckmateRounding,
    ChenGreedy,
    ChenSqrt,
    HeterogeneousChain,
    LocalSearch,
    Moccasin,
    Reordered,
    Revolve,
    SnapshotRefinement,
    Staged,
    StoreAll,
    solver_class,
)
from solvers.registry import UnknownSolverError
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.solution import SearchClass, Solution, Solver, Status, memory_floor
from tests.solvers.brute_force import BruteForce, budgets_of
from tests.solvers.random_graphs import EVERYTHING, PLAIN, Features, random_graph, training_chain

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Row:
    """A solver, and whether it promises a schedule for every graph and budget that admits one of its class."""

    solver: Solver
    applies: Callable[[Graph], bool]
    complete: bool


def _always(graph: Graph) -> bool:
    return True


def _segments(graph: Graph) -> bool:
    return ChenSqrt().applies_to(graph) is None


TABLE = {
    "store-all": Row(StoreAll(), _always, complete=True),
    "chen-sqrt": Row(ChenSqrt(), _segments, complete=False),
    "chen-greedy": Row(ChenGreedy(), _segments, complete=False),
    "revolve": Row(Revolve(), _segments, complete=False),
    "heterogeneous-chain": Row(HeterogeneousChain(), _segments, complete=False),
    "checkmate": Row(Checkmate(time_limit_seconds=20.0), _always, complete=True),
    "checkmate-rounding": Row(CheckmateRounding(time_limit_seconds=20.0), _always, complete=False),
    "staged": Row(Staged(time_limit_seconds=20.0), _always, complete=False),
    "moccasin": Row(Moccasin(time_limit_seconds=20.0), _always, complete=False),
    "snapshot": Row(SnapshotRefinement(time_limit_seconds=20.0, work_limit=3), _always, complete=False),
    "local-search": Row(LocalSearch(time_limit_seconds=20.0, move_limit=30_000), _always, complete=False),
    "reordered": Row(Reordered(time_limit_seconds=20.0, work_limit=1), _always, complete=False),
    "auto": Row(Auto(time_limit_seconds=20.0, work_limit=3), _always, complete=False),
}
GRADIENTS = Features(gradients=0.6, late_delivery=0.4, delivery_copy=0.5, workspace=0.4, gradient_accumulation=True)
GRAPHS = {
    "plain 1": lambda: random_graph(3, 5, PLAIN),
    "plain 2": lambda: random_graph(24, 5, PLAIN),
    "forward only": lambda: random_graph(8, 8, PLAIN, joint=False),
    "gradients": lambda: random_graph(5, 4, GRADIENTS),
    "everything 1": lambda: random_graph(0, 4, EVERYTHING),
    "everything 2": lambda: random_graph(6, 4, EVERYTHING),
    "chain": lambda: training_chain(6),
}


@pytest.fixture(params=TABLE, scope="module")
def row(request: pytest.FixtureRequest) -> Row:
    return TABLE[request.param]


def solved(row: Row, graph: Graph, budget_bytes: int) -> Solution:
    """Solve, and check what must hold of every solution."""
    if not row.applies(graph):
        pytest.skip("the solver does not apply to this graph")
    solution = row.solver.solve(graph, budget_bytes)
    if solution.schedule is None:
        assert math.isinf(solution.overhead)
        assert solution.status in (Status.INFEASIBLE, Status.UNKNOWN)
        assert solution.predicted_peak_bytes == 0
        assert solution.message
    else:
        simulation = simulate(graph, solution.schedule)
        assert simulation.peak_bytes <= budget_bytes
        assert simulation.peak_bytes == solution.predicted_peak_bytes
        seconds = graph.step_seconds
        assert solution.overhead == pytest.approx(simulation.recomputed_seconds / seconds if seconds else 0.0)
        assert solution.lower_bound <= solution.overhead + TOLERANCE
        assert solution.status in (Status.OPTIMAL, Status.FEASIBLE)
    assert solution.lower_bound >= 0.0
    assert solution.seconds >= 0.0
    assert solution.bound_scope
    return solution


@pytest.mark.parametrize("name", GRAPHS)
def test_against_brute_force(row: Row, name: str) -> None:
    graph = GRAPHS[name]()
    floor_bytes, _ = memory_floor(graph)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    for budget_bytes in budgets_of(graph, floor_bytes, peak_bytes)[1:3]:
        solution = solved(row, graph, budget_bytes)
        optimum = BruteForce(graph).overhead(budget_bytes)
        if solution.search_class is not SearchClass.FREE:  # another order may cost less
            assert solution.overhead >= optimum - TOLERANCE
        if solution.search_class is SearchClass.INTERVALS:
            assert "intervals" in solution.bound_scope  # a restriction: its bound is about itself
        elif "staged" not in solution.bound_scope:
            assert solution.lower_bound <= optimum + TOLERANCE
        else:
            assert solution.lower_bound <= BruteForce(graph, staged=True).overhead(budget_bytes) + TOLERANCE
        if row.complete and solution.search_class is SearchClass.STAGED:
            assert solution.overhead == pytest.approx(BruteForce(graph, staged=True).overhead(budget_bytes), abs=1e-6)


def test_store_all_budget_costs_nothing(row: Row) -> None:
    for name in ("plain 1", "everything 1", "chain"):
        graph = GRAPHS[name]()
        if row.applies(graph):
            peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
            solution = solved(row, graph, peak_bytes)
            assert (solution.status, solution.overhead) == (Status.OPTIMAL, 0.0)


def test_below_the_floor(row: Row) -> None:
    graph = training_chain(6)
    floor_bytes, operator = memory_floor(graph)
    solution = solved(row, graph, floor_bytes - 1)
    assert solution.status is Status.INFEASIBLE
    assert solution.floor_operator is not None
    assert solution.lower_bound == math.inf
    assert solution.smallest_known_budget_bytes is not None
    assert floor_bytes <= solution.smallest_known_budget_bytes
    if row.solver.name != "snapshot" and not isinstance(row.solver, Auto):
        assert solution.floor_operator == operator


def test_value_larger_than_the_budget(row: Row) -> None:
    graph = training_chain(5, size_bytes=1000)
    solution = solved(row, graph, 999)
    assert solution.status is Status.INFEASIBLE
    assert solution.schedule is None


def test_the_smallest_known_budget_works(row: Row) -> None:
    graph = training_chain(9)
    solution = solved(row, graph, memory_floor(graph)[0])
    if solution.schedule is None:
        assert solution.smallest_known_budget_bytes is not None
        assert solved(row, graph, solution.smallest_known_budget_bytes).schedule is not None


def test_deterministic(row: Row) -> None:
    graph = random_graph(24, 5, PLAIN)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    first, second = (solved(row, graph, peak_bytes * 9 // 10) for _ in range(2))
    assert (first.schedule, first.overhead, first.lower_bound) == (second.schedule, second.overhead, second.lower_bound)


def test_empty_graph(row: Row) -> None:
    graph = Graph((), (), {"parameters": 10})
    assert solved(row, graph, 10).status is Status.OPTIMAL
    assert solved(row, graph, 9).status is Status.INFEASIBLE


def test_one_operator(row: Row) -> None:
    graph = Graph((Operator("a", "t", "forward", (), (0,), 1.0),), (Value(5, 0, "output"),))
    assert solved(row, graph, 5).overhead == 0.0
    assert solved(row, graph, 4).status is Status.INFEASIBLE


def test_nothing_has_a_price(row: Row) -> None:
    chain = training_chain(4, seconds=0.0)
    peak_bytes = simulate(chain, Schedule.store_all(chain)).peak_bytes
    solution = solved(row, chain, peak_bytes - 1)
    if solution.schedule is not None:
        assert solution.overhead == 0.0


def test_disconnected_parts(row: Row) -> None:
    operators = tuple(Operator(f"o{i}", "t", "forward" if i < 3 else "backward", (), (i,), 1.0) for i in range(6))
    graph = Graph(operators, tuple(Value(4, i) for i in range(6)))
    assert solved(row, graph, 4).overhead == 0.0
    assert solved(row, graph, 3).status is Status.INFEASIBLE


def test_a_larger_budget_costs_no_more(row: Row) -> None:
    graph = training_chain(6)
    floor_bytes, _ = memory_floor(graph)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    overheads = [solved(row, graph, b).overhead for b in budgets_of(graph, floor_bytes, peak_bytes, 5)]
    assert overheads == sorted(overheads, reverse=True)


def test_the_table_is_complete() -> None:
    assert set(TABLE) == set(SOLVERS)
    for name, row in TABLE.items():
        assert solver_class(name) is type(row.solver)
        assert SOLVERS[name].description


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UnknownSolverError, match=r"did you mean 'checkmate'.*store-all"):
        solver_class("checkmat")


def test_solvers_are_frozen(row: Row) -> None:
    with pytest.raises(AttributeError):
        row.solver.seed = 1  # type: ignore[attr-defined]
    assert row.solver == type(row.solver)(**vars(row.solver))
    assert hash(row.solver) == hash(type(row.solver)(**vars(row.solver)))
