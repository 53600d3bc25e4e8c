"""The staged program: Checkmate's where every operator is a stage, a restriction of it where stages are coarse."""

from __future__ import annotations

import dataclasses

import pytest

from graph_capture.graph import Graph
from solvers.checkmate import Checkmate
from solvers.hints import Hints, Progress
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.snapshot.engine import EnginePool, Limits
from solvers.solution import Status, memory_floor
from solvers.staged import Staged
from solvers.staged_memory import StageMemory
from solvers.staged_model import StageColumns
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import EVERYTHING, PLAIN, Features, random_graph, training_chain

NOT_IN_PLACE = dataclasses.replace(EVERYTHING, in_place=0.0)


def peak_of(graph: Graph) -> int:
    return simulate(graph, Schedule.store_all(graph)).peak_bytes


def finest(graph: Graph) -> Staged:
    return Staged(boundaries=tuple(range(len(graph))), tiny_fraction=0.0, gap=0.0)


@pytest.mark.parametrize("features", [PLAIN, NOT_IN_PLACE])
def test_is_checkmate_where_every_operator_is_a_stage(features: Features) -> None:
    found = 0
    for seed in range(7):
        graph = random_graph(seed, 4, features)
        budget_bytes = (memory_floor(graph)[0] + (1 + seed % 3) * peak_of(graph)) // (2 + seed % 3)
        ours, checkmate = finest(graph).solve(graph, budget_bytes), Checkmate().solve(graph, budget_bytes)
        assert ours.status is checkmate.status
        assert ours.overhead == pytest.approx(checkmate.overhead, abs=1e-6)
        assert ours.lower_bound == pytest.approx(checkmate.lower_bound, abs=1e-6)
        found += ours.schedule is not None
    assert found >= 2


@pytest.mark.parametrize("features", [PLAIN, EVERYTHING])
def test_every_point_of_the_program_fits(features: Features) -> None:
    """Whatever the stages: the simulator never finds a point's schedule over the budget that the program held."""
    points = 0
    with EnginePool() as pool:
        for seed in range(24):
            graph = random_graph(seed, 5, features)
            budget_bytes = (memory_floor(graph)[0] + 6 * peak_of(graph)) // 7
            starts = [0, *range(1 + seed % 3, len(graph), 2 + seed % 3)]
            model = StageColumns(graph, starts, tiny_bytes=seed % 4)
            if StageMemory(model, budget_bytes).hopeless is not None:
                continue
            answer = pool.solve(model.program.serialized(), Limits(20.0, relative_gap=0.0))
            if answer.has_point:
                points += 1
                order = model.order(answer.columns)
                simulation = simulate(graph, Schedule.from_order(graph, order))
                assert simulation.peak_bytes <= budget_bytes
                assert simulation.recomputed_seconds / graph.step_seconds == pytest.approx(answer.objective, abs=1e-6)
    assert points >= 5


def test_coarse_stages_are_never_better_than_the_class() -> None:
    for seed in range(4):
        graph = random_graph(seed, 4, PLAIN)
        budget_bytes = (memory_floor(graph)[0] + 2 * peak_of(graph)) // 3
        solution = Staged(stages=3).solve(graph, budget_bytes)
        assert solution.overhead >= BruteForce(graph).overhead(budget_bytes) - 1e-6
        assert solution.lower_bound in (0.0, solution.overhead)  # 0.0, or nothing needs to be recomputed


def test_more_stages_find_more() -> None:
    graph = training_chain(9)
    overheads = [Staged(stages=n, gap=0.0).solve(graph, 60).overhead for n in (2, 4, 10)]
    assert overheads == sorted(overheads, reverse=True)
    assert overheads[-1] == pytest.approx(Checkmate().solve(graph, 60).overhead, abs=1e-6)


def test_stages_of_a_joint_graph() -> None:
    """The forward phase is one stage, the backward phase is split evenly."""
    graph = training_chain(6)
    assert Staged(stages=4).starts(graph) == [0, 6, 8, 10]
    assert Staged(stages=1).starts(graph) == [0]
    assert Staged(boundaries=(0, 5)).starts(graph) == [0, 5]
    assert Staged(stages=3).starts(random_graph(1, 6, PLAIN, joint=False)) == [0, 2, 4]


def test_refusals() -> None:
    graph = training_chain(6)
    assert "the graph has 12 operators" in (Staged(boundaries=(0, 40)).applies_to(graph) or "")
    assert "ask for fewer stages" in (Staged(max_columns=10).applies_to(graph) or "")
    with pytest.raises(ValueError, match="ascending from 0"):
        Staged(boundaries=(3, 1))
    with pytest.raises(ValueError, match="at least one is needed"):
        Staged(stages=0)


def test_hints_are_candidates_and_progress_is_reported() -> None:
    graph = training_chain(8)
    optimum = Checkmate().solve(graph, 60)
    assert optimum.schedule is not None
    seen: list[Progress] = []
    solution = Staged(stages=2).solve(graph, 60, Hints(schedules=(optimum.schedule,), progress=seen.append))
    assert solution.overhead <= optimum.overhead
    assert solution.status in (Status.FEASIBLE, Status.OPTIMAL)


def test_nothing_found_is_no_proof() -> None:
    graph = training_chain(10)
    solution = Staged(stages=2).solve(graph, memory_floor(graph)[0])
    assert solution.status is Status.UNKNOWN
    assert "at their fixed places" in solution.message
