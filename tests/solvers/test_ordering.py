"""Legal orders of first executions, searches for better ones, and graphs in another order."""

from __future__ import annotations

import dataclasses
import random

import networkx
import pytest

from graph_capture.graph import Graph, Operator, Value
from solvers import Schedule, ScheduleError, memory_floor, simulate
from solvers.checkmate import Checkmate
from solvers.chen import ChenGreedy
from solvers.ordering import OrderSearch, reordered
from solvers.precedence import precedence, violation
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import EVERYTHING, PLAIN, random_graph, training_chain
from tests.solvers.random_orders import random_order

QUICK = OrderSearch(beam_width=16, moves=20_000, moves_per_operator=0)


def _peak(graph: Graph, order: tuple[int, ...] | list[int]) -> int:
    return simulate(graph, Schedule.from_order(graph, order)).peak_bytes


@pytest.mark.parametrize("seed", range(40))
def test_the_simulator_accepts_every_legal_order(seed: int) -> None:
    graph = random_graph(seed, 6, EVERYTHING)
    rng = random.Random(seed)
    for _ in range(5):
        order = random_order(graph, rng)
        assert violation(graph, order) is None
        simulation = simulate(graph, Schedule.from_order(graph, order))
        assert simulation.recomputed_seconds == 0
        assert simulation.peak_bytes >= memory_floor(graph)[0]


@pytest.mark.parametrize("seed", range(40))
def test_a_reordered_graph_has_the_same_memory(seed: int) -> None:
    graph = random_graph(seed, 6, EVERYTHING)
    order = random_order(graph, random.Random(seed))
    other = reordered(graph, order)
    assert simulate(other.graph, Schedule.store_all(other.graph)).peak_bytes == _peak(graph, order)
    schedule = Schedule.from_order(graph, order)
    assert other.schedule_of_original(other.schedule_of_graph(schedule)) == schedule
    assert reordered(other.graph, [order.index(i) for i in range(len(graph))]).graph == graph


def test_solvers_work_on_a_reordered_graph() -> None:
    graph = random_graph(24, 5, PLAIN)
    order = random_order(graph, random.Random(1))
    other = reordered(graph, order)
    budget_bytes = simulate(other.graph, Schedule.store_all(other.graph)).peak_bytes * 9 // 10
    solution = Checkmate().solve(other.graph, budget_bytes)
    assert solution.overhead == pytest.approx(BruteForce(other.graph, staged=True).overhead(budget_bytes))
    assert solution.schedule is not None
    assert simulate(graph, other.schedule_of_original(solution.schedule)).peak_bytes <= budget_bytes
    assert ChenGreedy().applies_to(other.graph) == ChenGreedy().applies_to(graph)


def _with(graph: Graph, index: int, **fields: object) -> Graph:
    operators = list(graph.operators)
    operators[index] = dataclasses.replace(operators[index], **fields)
    return dataclasses.replace(graph, operators=tuple(operators))


def _independent(n: int, phase: str = "forward") -> Graph:
    operators = tuple(Operator(f"o{i}", "t", phase, (), (i,), 1.0) for i in range(n))  # type: ignore[arg-type]
    return Graph(operators, tuple(Value(4, i) for i in range(n)))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"random_state_bytes": 8}, "draw random numbers"),
        ({"recomputable": False, "keep_reason": "it changes a buffer"}, "must not run twice"),
    ],
)
def test_what_is_seen_from_outside_keeps_its_order(fields: dict[str, object], reason: str) -> None:
    graph = _with(_with(_independent(3), 0, **fields), 2, **fields)
    assert (0, 2) in precedence(graph).edges
    assert violation(graph, [1, 0, 2]) is None
    assert "operator 2 (o2) must not run before operator 0 (o0)" in str(violation(graph, [2, 1, 0]))
    with pytest.raises(ScheduleError, match=reason):
        simulate(graph, Schedule.from_order(graph, [2, 1, 0]))
    with pytest.raises(ValueError, match="not a legal order"):
        reordered(graph, [2, 1, 0])


def test_gradients_are_delivered_in_captured_order() -> None:
    operators = tuple(Operator(f"o{i}", "t", "backward", (), (i,), 1.0) for i in range(3))
    values = tuple(Value(4, i, "gradient", delivered_after=i) for i in range(3))
    graph = Graph(operators, values)
    assert violation(graph, [0, 1, 2]) is None
    with pytest.raises(ScheduleError, match="complete a gradient"):
        simulate(graph, Schedule.from_order(graph, [1, 0, 2]))
    late = dataclasses.replace(graph, values=(dataclasses.replace(values[0], delivered_after=2), *values[1:]))
    assert {(0, 2), (1, 2)} <= set(precedence(late).edges)
    assert violation(late, [1, 0, 2]) is None


def test_phases_and_the_loss_keep_their_order() -> None:
    graph = random_graph(6, 5, EVERYTHING)
    closure = networkx.transitive_closure_dag(precedence(graph))
    phases = ["forward", "loss", "backward"]
    for earlier, one in enumerate(graph.operators):
        for later, other in enumerate(graph.operators):
            before = phases.index(one.phase) < phases.index(other.phase)
            if before or (one.phase == other.phase == "loss" and earlier < later):
                assert closure.has_edge(earlier, later)


def test_orders_that_are_none() -> None:
    graph = _independent(3)
    assert violation(graph, [0, 1]) == "operator 2 never runs"
    with pytest.raises(ValueError, match="occurs twice"):
        reordered(graph, [0, 1, 1, 2])


def test_interleaved_chains_are_untangled() -> None:
    """Two chains side by side: one after the other needs half of the memory."""
    n = 10
    operators = tuple(Operator(f"o{i}", "t", "forward", () if i < 2 else (i - 2,), (i,), 1.0) for i in range(n))
    graph = Graph(operators, tuple(Value(1 if i >= n - 2 else 100, i) for i in range(n)))
    assert _peak(graph, list(range(n))) == 300
    found = QUICK.best(graph)
    assert found.peak_bytes == _peak(graph, found.order) == 200
    assert found.search != "captured"


@pytest.mark.parametrize("seed", range(8))
def test_small_graphs_get_their_best_order(seed: int) -> None:
    graph = random_graph(seed, 7, PLAIN, joint=False)
    best = min(_peak(graph, order) for order in networkx.all_topological_sorts(precedence(graph)))
    assert QUICK.best(graph).peak_bytes == best


def test_never_worse_and_the_same_each_time() -> None:
    for seed in range(10):
        graph = random_graph(seed, 8, EVERYTHING)
        found = QUICK.best(graph)
        assert violation(graph, found.order) is None
        assert found.peak_bytes <= _peak(graph, list(range(len(graph))))
        assert found == QUICK.best(graph)


def test_without_freedom_the_captured_order_stays() -> None:
    graph = training_chain(5)
    assert QUICK.best(graph).search == "captured"
    empty = Graph((), ())
    assert QUICK.best(empty).order == ()
