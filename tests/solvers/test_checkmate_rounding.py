"""Two-phase rounding: minimal repetitions for what is kept, and a bound that holds for the staged class."""

from __future__ import annotations

import pytest

from solvers.checkmate import Checkmate
from solvers.checkmate_model import StagedModel
from solvers.checkmate_rounding import CheckmateRounding, rounded_order
from solvers.hints import Hints, Progress
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.solution import Status, memory_floor
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import EVERYTHING, PLAIN, Features, random_graph, training_chain


def test_keeping_everything_repeats_nothing() -> None:
    graph = training_chain(5)
    model = StagedModel(graph, 1000)
    everything = dict.fromkeys(model.keep.values(), 1.0)
    assert rounded_order(model, everything, 0.5) == list(range(len(graph)))


def test_keeping_nothing_repeats_all_that_is_needed() -> None:
    """Three layers f0 f1 f2 and their backwards, nothing kept: every stage begins from the first operator."""
    graph = training_chain(3)
    order = rounded_order(StagedModel(graph, 1000), {}, 0.5)
    assert order[:6] == [0, 0, 1, 0, 1, 2]
    assert order[-6:] == [0, 1, 2, 3, 4, 5]
    simulate(graph, Schedule.from_order(graph, order))


def test_the_threshold_decides_what_is_kept() -> None:
    graph = training_chain(4)
    model = StagedModel(graph, 1000)
    half = dict.fromkeys(model.keep.values(), 0.5)
    assert rounded_order(model, half, 0.4) == list(range(len(graph)))
    assert len(rounded_order(model, half, 0.5)) > len(graph)


@pytest.mark.parametrize(("features", "least"), [(PLAIN, 9), (EVERYTHING, 5)])
def test_against_the_optimum(features: Features, least: int) -> None:
    """The relaxation bounds the staged optimum, the rounded schedule is no better; infeasible only if nothing fits."""
    found = 0
    for seed in range(12):
        graph = random_graph(seed, 4, features)
        peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
        budget_bytes = (memory_floor(graph)[0] + 2 * peak_bytes) // 3
        solution = CheckmateRounding().solve(graph, budget_bytes)
        optimum = BruteForce(graph, staged=True).overhead(budget_bytes)
        assert solution.lower_bound <= optimum + 1e-6
        assert solution.overhead >= optimum - 1e-6
        assert "staged" in solution.bound_scope or solution.status is Status.OPTIMAL
        found += solution.schedule is not None
    assert found >= least


def test_chains_are_rounded_to_the_optimum_or_near() -> None:
    graph = training_chain(10)
    for budget_bytes in (100, 90, 80):
        solution = CheckmateRounding().solve(graph, budget_bytes)
        optimum = Checkmate().solve(graph, budget_bytes)
        assert solution.lower_bound <= optimum.overhead + 1e-6
        assert optimum.overhead - 1e-6 <= solution.overhead <= optimum.overhead + 0.25


def test_both_engines_give_the_same_bound() -> None:
    graph = training_chain(8)
    first, second = (CheckmateRounding(engine=e).solve(graph, 70) for e in ("GLOP", "HIGHS"))  # type: ignore[arg-type]
    assert first.lower_bound == pytest.approx(second.lower_bound, abs=1e-7)


def test_hints_are_candidates_and_progress_is_reported() -> None:
    graph = training_chain(8)
    optimum = Checkmate().solve(graph, 70)
    assert optimum.schedule is not None
    seen: list[Progress] = []
    solution = CheckmateRounding().solve(graph, 70, Hints(schedules=(optimum.schedule,), progress=seen.append))
    assert solution.overhead <= optimum.overhead
    assert seen
    assert all(p.lower_bound <= p.overhead for p in seen)


def test_a_time_limit_of_zero_says_so() -> None:
    solution = CheckmateRounding(time_limit_seconds=0.0).solve(training_chain(8), 70)
    assert solution.status is Status.UNKNOWN
    assert solution.hit_limit


def test_refuses_large_graphs() -> None:
    solution = CheckmateRounding(max_operators=10).solve(training_chain(6), 1)
    assert solution.status is Status.NOT_APPLICABLE
    assert "12 operators are too many" in solution.message
