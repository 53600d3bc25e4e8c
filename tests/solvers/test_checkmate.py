"""Checkmate: equal to exhaustive search over its class, and never better than the ordered one."""

from __future__ import annotations

import dataclasses

import pytest

from graph_capture.graph import Graph
from solvers.checkmate import Checkmate
from solvers.checkmate_model import StagedModel
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.solution import Status, memory_floor
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import EVERYTHING, PLAIN, Features, random_graph, training_chain
from tests.solvers.shared_engines import shared_engines

GRADIENTS = Features(
    in_place=0.6,
    random_state=0.4,
    gradients=0.7,
    gradient_reads=0.5,
    late_delivery=0.4,
    delivery_copy=0.5,
    several_outputs=0.3,
    gradient_accumulation=True,
)


def peak_of(graph: Graph) -> int:
    return simulate(graph, Schedule.store_all(graph)).peak_bytes


@pytest.mark.parametrize(
    ("features", "n", "seeds"),
    [
        (PLAIN, 4, range(200, 210)),
        (PLAIN, 5, range(100, 108)),
        *((f, 4, range(100, 105)) for f in (GRADIENTS, EVERYTHING)),
    ],
    ids=["tiny", "plain", "gradients", "everything"],
)
def test_equals_exhaustive_search(features: Features, n: int, seeds: range) -> None:
    with shared_engines():
        for seed in seeds:
            graph = random_graph(seed, n, features)
            peak_bytes = peak_of(graph)
            for percent in (75, 90):
                budget_bytes = max(memory_floor(graph)[0], peak_bytes * percent // 100)
                solution = Checkmate().solve(graph, budget_bytes)
                optimum = BruteForce(graph, staged=True).overhead(budget_bytes)
                assert solution.overhead == pytest.approx(optimum, abs=1e-6), seed
                assert solution.status in (Status.OPTIMAL, Status.INFEASIBLE)
                assert solution.overhead >= BruteForce(graph).overhead(budget_bytes) - 1e-6


def test_staged_is_a_smaller_class_than_ordered() -> None:
    """A budget that only recomputing twice between two first executions meets: the bound must not claim more."""
    graph, budget_bytes = random_graph(35, 4, PLAIN), 32
    assert BruteForce(graph).optimum_seconds(budget_bytes) == 28.0
    solution = Checkmate().solve(graph, budget_bytes)
    assert solution.status is Status.INFEASIBLE
    assert "staged" in solution.bound_scope


def test_staged_optimum_may_be_dearer_than_the_ordered_one() -> None:
    graph, budget_bytes = random_graph(134, 4, PLAIN), 32
    solution = Checkmate().solve(graph, budget_bytes)
    assert solution.overhead * graph.step_seconds == pytest.approx(6.0)
    assert solution.lower_bound * graph.step_seconds == pytest.approx(6.0, abs=1e-3)
    assert BruteForce(graph).optimum_seconds(budget_bytes) == 4.0


@pytest.mark.parametrize(("budget_bytes", "recomputed"), [(110, 0), (100, 1), (90, 2), (80, 3), (70, 4)])
def test_chain_of_ten(budget_bytes: int, recomputed: int) -> None:
    """Each of the first recomputations is of a lone layer between two kept ones and saves its 10 bytes."""
    solution = Checkmate(time_limit_seconds=60.0).solve(training_chain(10), budget_bytes)
    assert solution.status is Status.OPTIMAL
    assert solution.overhead * 20 == pytest.approx(recomputed)


def test_refuses_large_graphs() -> None:
    solution = Checkmate(max_operators=10).solve(training_chain(6), 1)
    assert solution.status is Status.NOT_APPLICABLE
    assert "12 operators are too many" in solution.message
    assert "max_operators is 10" in solution.message


def test_several_in_place_pairs_narrow_the_claim() -> None:
    plain = training_chain(5)
    last = plain.operators[-1]
    pairs = tuple((v, last.outputs[0]) for v in last.inputs)
    operators = (*plain.operators[:-1], dataclasses.replace(last, in_place=pairs))
    graph = dataclasses.replace(plain, operators=operators)
    assert len(pairs) > 1
    assert StagedModel(graph, 50).restricted
    solution = Checkmate().solve(graph, peak_of(graph) - 10)
    assert solution.schedule is not None
    assert "first is used" in solution.bound_scope


def test_a_time_limit_leaves_a_valid_bound() -> None:
    graph = training_chain(14)
    optimum = Checkmate(node_limit=None).solve(graph, 90)
    hasty = Checkmate(node_limit=1).solve(graph, 90)
    assert hasty.lower_bound <= optimum.overhead + 1e-6


@pytest.mark.parametrize("engine", ["GSCIP", "CP_SAT"])
def test_other_engines_agree(engine: str) -> None:
    solution = Checkmate(engine=engine).solve(training_chain(6), 50)  # type: ignore[arg-type]
    assert solution.overhead == pytest.approx(Checkmate().solve(training_chain(6), 50).overhead)
