"""Snapshot refinement as a solver: its outcomes, its work limit, its engines in processes, its annealer's memory."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from graph_capture.graph import Graph
from solvers.hints import Hints, Progress, Suggestion
from solvers.schedule import Schedule, outside_loss
from solvers.simulator import simulate
from solvers.snapshot import SnapshotRefinement, anneal, search, walks
from solvers.snapshot.anneal import Annealer, Cooling
from solvers.snapshot.engine import EnginePool, Limits, Outcome
from solvers.snapshot.lift import prune
from solvers.snapshot.milp import LinearProgram
from solvers.snapshot.reduction import can_repeat
from solvers.snapshot.suggestions import SLOW_ROUND
from solvers.solution import Status
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import EVERYTHING, PLAIN, Features, random_graph, training_chain


def peak_of(graph: Graph) -> int:
    return simulate(graph, Schedule.store_all(graph)).peak_bytes


def random_order(graph: Graph, rng: random.Random) -> list[int]:
    """Captured order with legal recomputations strewn in."""
    repeatable = can_repeat(graph)
    order: list[int] = []
    for index in range(len(graph)):
        order += [o for o in range(index) if repeatable[o] and rng.random() < 0.15]
        order.append(index)
    return outside_loss(graph, order)


def small_program() -> bytes:
    program = LinearProgram()
    a, b = program.add_column(1.0), program.add_column(2.0)
    program.at_least([(a, 1.0), (b, 1.0)], 1.0)
    return program.serialized()


@pytest.mark.parametrize("features", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_the_annealer_counts_as_the_simulator_does(features: Features) -> None:
    for seed in range(150):
        graph = random_graph(seed, 6, features)
        order = random_order(graph, random.Random(seed))
        simulation = simulate(graph, Schedule.from_order(graph, order))
        percent, peak, profile = Annealer(graph).evaluate(order)
        assert percent == pytest.approx(100.0 * simulation.recomputed_seconds / graph.step_seconds)
        gradients_read_again = any(
            repeatable and any(graph.values[v].kind == "gradient" for v in operator.inputs)
            for repeatable, operator in zip(can_repeat(graph), graph.operators, strict=True)
        )
        if gradients_read_again:  # taken to be kept, because the walk may read them again at any time
            assert peak >= simulation.peak_bytes, seed
        else:
            assert peak == simulation.peak_bytes, seed
            assert tuple(profile) == simulation.timeline_bytes or graph.gradient_accumulation, seed


def test_pruning_drops_only_what_nobody_reads() -> None:
    graph = training_chain(4)
    assert prune(graph, [0, 1, 0, 2, 0, 3, 4, 5, 0, 6, 7]) == [0, 1, 2, 3, 4, 5, 0, 6, 7]


def test_enough_memory_is_store_all_at_once() -> None:
    graph = training_chain(5)
    solution = SnapshotRefinement().solve(graph, peak_of(graph))
    assert solution.status is Status.OPTIMAL
    assert (solution.overhead, solution.lower_bound, solution.trace) == (0.0, 0.0, ())
    assert solution.schedule == Schedule.store_all(graph)


@pytest.mark.parametrize("seed", range(25))
def test_small_graphs_are_sandwiched(seed: int) -> None:
    """bound ≤ optimum ≤ overhead; a schedule is found where one exists, infeasible is said only where none does."""
    joint = seed % 2 == 0
    graph = random_graph(seed, 4 if joint else 7, EVERYTHING if seed % 3 == 0 else PLAIN, joint)
    budget = int(0.8 * peak_of(graph))
    optimum = BruteForce(graph).overhead(budget)
    solution = SnapshotRefinement(work_limit=6, gap=0.0).solve(graph, budget)
    assert solution.lower_bound <= optimum + 1e-9
    if solution.schedule is None:
        assert solution.status in (Status.INFEASIBLE, Status.UNKNOWN)
        assert math.isinf(solution.overhead)
        assert solution.message
        assert solution.status is Status.UNKNOWN or math.isinf(optimum)
    else:
        simulation = simulate(graph, solution.schedule)
        assert simulation.peak_bytes == solution.predicted_peak_bytes <= budget
        assert solution.overhead == pytest.approx(simulation.recomputed_seconds / graph.step_seconds)
        assert optimum <= solution.overhead + 1e-9


def test_a_survey_of_the_backward_pass_closes_the_gap() -> None:
    """Room for two of 12 layers; the first rounds prove 8 of 24 operators again, the question all over proves 14."""
    graph = training_chain(12)
    before = SnapshotRefinement(work_limit=3, gap=0.0).solve(graph, 50)
    assert before.lower_bound < 9 / 24
    after = SnapshotRefinement(work_limit=4, gap=0.0).solve(graph, 50)
    assert after.status is Status.OPTIMAL
    assert after.overhead == pytest.approx(14 / 24)


def test_work_limit_is_deterministic() -> None:
    graph = random_graph(3, 12, PLAIN)
    solver = SnapshotRefinement(work_limit=3, gap=0.0, seed=5)
    first, second = (solver.solve(graph, int(0.6 * peak_of(graph))) for _ in range(2))
    assert (first.schedule, first.overhead, first.lower_bound) == (second.schedule, second.overhead, second.lower_bound)


def test_the_walk_towards_the_budget_does_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits before that walk, and its fourth attempt finds what fits, however late it is by then."""
    graph = random_graph(2, 24, PLAIN)
    solver = SnapshotRefinement(time_limit_seconds=6000.0, work_limit=2, gap=0.0)
    budget = int(0.65 * peak_of(graph))
    clock = _Clock()
    for module in (search, walks, anneal):
        monkeypatch.setattr(module, "time", clock)
    walked: list[tuple[bool, bool]] = []
    approach = walks.Walks.approach

    def noted(self: walks.Walks, seconds: float) -> None:
        before, clock.jumping = self.search.incumbent.order is None, True
        approach(self, seconds)
        walked.append((before, self.search.incumbent.order is not None))
        clock.jumping = False

    monkeypatch.setattr(walks.Walks, "approach", noted)
    outcomes = []
    # Where no work limit is given the walk may take 720 seconds; the last of these clocks passes that.
    for jump_seconds in (0.0, 1.0, 6.0):
        clock.restart(jump_seconds)
        solution = solver.solve(graph, budget)
        assert solution.schedule is not None
        assert simulate(graph, solution.schedule).peak_bytes <= budget
        events = [line.partition("round")[2] for line in solution.trace if "MILP" not in line]  # without seconds
        outcomes.append((str(solution.schedule.to_list()).encode(), solution.lower_bound, events))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert sum("approached" in line for line in outcomes[0][2]) == 4
    assert walked == [(True, True)] * 3
    assert 1000 < clock.ahead_seconds < 5000


class _Clock:
    """Jumps at every reading while a walk goes on."""

    def restart(self, jump_seconds: float) -> None:
        self.jump_seconds, self.ahead_seconds, self.jumping = jump_seconds, 0.0, False

    def monotonic(self) -> float:
        self.ahead_seconds += self.jump_seconds * self.jumping
        return time.monotonic() + self.ahead_seconds


def test_impossible_budget_names_operator_and_a_budget_that_works() -> None:
    graph = training_chain(6)
    solution = SnapshotRefinement().solve(graph, 25)
    assert solution.status is Status.INFEASIBLE
    assert solution.floor_operator is not None
    assert graph.operators[solution.floor_operator].name in solution.message
    assert solution.smallest_known_budget_bytes is not None
    assert 25 < solution.smallest_known_budget_bytes <= peak_of(graph)


def test_annealing_mends_a_sequence_that_does_not_fit() -> None:
    graph = training_chain(8)
    budget = int(0.7 * peak_of(graph))
    result = Annealer(graph).anneal(range(len(graph)), budget, seed=1, cooling=Cooling(), seconds=5.0, moves=20_000)
    assert result.best is not None
    assert simulate(graph, Schedule.from_order(graph, result.best)).peak_bytes <= budget


def test_engine_that_hangs_is_killed_and_replaced() -> None:
    with EnginePool() as pool:
        assert pool.solve(small_program(), Limits(5.0)).outcome is Outcome.OPTIMAL
        worker = pool._workers["HIGHS"]
        assert worker is not None
        os.kill(worker.process.pid, signal.SIGSTOP)
        began = time.monotonic()
        answer = pool.solve(small_program(), Limits(0.2))
        assert answer.outcome is Outcome.LIMIT
        assert not answer.has_point
        assert time.monotonic() - began < 10.0
        assert worker.process.poll() is not None
        assert pool.solve(small_program(), Limits(5.0)).objective == pytest.approx(1.0)


def test_engines_race() -> None:
    with EnginePool(("HIGHS", "GSCIP")) as pool:
        answer = pool.solve(small_program(), Limits(5.0))
    assert answer.outcome is Outcome.OPTIMAL
    assert answer.columns == {0: 1.0}


def test_no_process_is_left_behind() -> None:
    with EnginePool() as pool:
        worker = pool._workers["HIGHS"]
        assert worker is not None
    assert worker.process.poll() is not None
    orphan = EnginePool()
    orphan.__enter__()
    worker = orphan._workers["HIGHS"]
    assert worker is not None
    assert worker.process.stdin is not None
    worker.process.stdin.close()  # what the death of the parent does
    assert worker.process.wait(timeout=20) == 0
    orphan.__exit__(None, None, None)


def test_import_is_light() -> None:
    code = "import sys, solvers.snapshot; sys.exit(any(m in sys.modules for m in ('torch', 'ortools', 'numba')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def interrupted(with_a_schedule: bool) -> Hints:
    """A listener that does what Ctrl-C does, when the search has a schedule, or before."""

    def listen(progress: Progress) -> None:
        if math.isfinite(progress.overhead) or not with_a_schedule:
            raise KeyboardInterrupt

    return Hints(progress=listen)


def test_an_interrupt_returns_the_best_schedule_so_far() -> None:
    graph = training_chain(12)
    budget = int(0.7 * peak_of(graph))
    solution = SnapshotRefinement(gap=0.0).solve(graph, budget, interrupted(with_a_schedule=True))
    assert solution.schedule is not None
    assert "interrupted" in solution.message
    assert simulate(graph, solution.schedule).peak_bytes <= budget
    assert solution.lower_bound <= solution.overhead


def test_an_interrupt_before_there_is_a_schedule_goes_on_to_the_caller() -> None:
    graph = training_chain(12)
    with pytest.raises(KeyboardInterrupt):
        SnapshotRefinement().solve(graph, int(0.7 * peak_of(graph)), interrupted(with_a_schedule=False))


def test_what_is_known_is_used() -> None:
    """A schedule from a solve before is at hand at once; a bound of a larger budget is kept."""
    graph = training_chain(12)
    budget = int(0.7 * peak_of(graph))
    first = SnapshotRefinement(gap=0.0).solve(graph, budget)
    assert first.schedule is not None
    again = SnapshotRefinement(gap=0.0).solve(
        graph, budget, Hints(schedules=(first.schedule,), lower_bound=first.lower_bound)
    )
    assert again.overhead <= first.overhead
    assert again.lower_bound >= first.lower_bound
    assert again.schedule_by == "what was known"


def test_suggestions_of_another_class_are_not_taken() -> None:
    """An order that swaps first executions may be cheaper than the bound allows: it is no schedule of this class."""
    graph = training_chain(12)
    order = [1, 0, *range(2, len(graph))]
    tried: list[str] = []

    def suggest() -> list[Suggestion]:
        tried.append("asked")
        return [Suggestion("elsewhere", order)]

    solution = SnapshotRefinement(work_limit=1, gap=0.0).solve(graph, int(0.9 * peak_of(graph)), Hints(suggest=suggest))
    assert tried == ["asked"]
    assert solution.schedule_by != "elsewhere"


@pytest.mark.parametrize(("rounds", "asked"), [(SLOW_ROUND - 1, False), (SLOW_ROUND, True)])
def test_slow_suggestions_wait_until_the_gap_has_been_open_for_a_while(rounds: int, asked: bool) -> None:
    graph = training_chain(24)
    tried: list[str] = []

    def suggest_slowly() -> Iterator[Suggestion]:
        tried.append("asked")
        yield from ()

    solver = SnapshotRefinement(work_limit=rounds, gap=0.0)
    solution = solver.solve(graph, peak_of(graph) // 5, Hints(suggest_slowly=suggest_slowly))
    assert solution.hit_limit
    assert bool(tried) == asked
