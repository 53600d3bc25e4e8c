"""Ctrl-C while something is searched for: what is known by then is the answer, and it is said that it was cut short."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest

from planner.certificate.make import certify
from planner.max_batch_size import max_batch_size
from solvers import Auto
from solvers.chen import ChenGreedy
from solvers.hints import NO_HINTS, Hints, Progress
from solvers.local_search import LocalSearch
from solvers.minimum_budget import minimum_budget
from solvers.pareto import curve
from solvers.simulator import simulate, simulate_store_all
from solvers.snapshot import SnapshotRefinement
from solvers.solution import Solution, Solver
from tests.planner.plans import chain
from tests.planner.test_max_batch_size import SOLVER, Net, inputs
from tests.solvers.random_graphs import EVERYTHING, random_graph

GRAPH = chain()
PEAK_BYTES = simulate_store_all(GRAPH).peak_bytes
SKIPS = random_graph(0, 9, EVERYTHING)
"""No chain: the smallest budget takes several probes, and the gap stays open until Checkmate is asked."""


@dataclass(frozen=True)
class Interrupted(Solver):
    """Snapshot refinement, until Ctrl-C is pressed at its n-th solve: before it begins, or as it ends."""

    at: int
    within: bool = False
    calls: list[int] = dataclasses.field(default_factory=list)
    name: ClassVar[str] = "interrupted"

    def solve(self, graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        self.calls.append(budget_bytes)
        if len(self.calls) == self.at and not self.within:
            raise KeyboardInterrupt
        solution = SnapshotRefinement(work_limit=3).solve(graph, budget_bytes, hints)
        return dataclasses.replace(solution, interrupted=len(self.calls) == self.at)


def pressed(stage: str) -> Callable[[Progress], None]:
    """A listener that presses Ctrl-C at a stage."""

    def listen(event: Progress) -> None:
        if stage in event.stage:
            raise KeyboardInterrupt

    return listen


@pytest.mark.parametrize("within", [False, True])
def test_the_smallest_budget(within: bool) -> None:
    solver = Interrupted(2, within)
    found = minimum_budget(SKIPS, solver)
    assert found.hit_limit
    assert found.probes == len(solver.calls) == 2
    assert simulate(SKIPS, found.schedule).peak_bytes == found.peak_bytes
    assert found.lower_bound_bytes <= found.peak_bytes


def test_the_smallest_budget_says_where_it_stands() -> None:
    events: list[Progress] = []
    found = minimum_budget(SKIPS, SnapshotRefinement(work_limit=2, gap=100.0), progress=events.append)
    stages = [event.stage.partition(":")[0] for event in events]
    assert stages[:2] == ["asking the solvers of chains", "probe 1"]
    for event in events:
        assert event.peak_bytes is not None
        assert event.lower_bound_bytes is not None
        assert event.lower_bound_bytes <= found.peak_bytes <= event.peak_bytes


@pytest.mark.parametrize("within", [False, True])
def test_the_curve_has_the_budgets_solved_by_then(within: bool) -> None:
    points = curve(GRAPH, [PEAK_BYTES, PEAK_BYTES - 50, PEAK_BYTES - 100], Interrupted(2, within))
    assert [p.budget_bytes for p in points] == [PEAK_BYTES - 50, PEAK_BYTES][not within :]
    with pytest.raises(KeyboardInterrupt):
        curve(GRAPH, [PEAK_BYTES], Interrupted(1))


def test_the_curve_says_which_budget_it_is_at() -> None:
    events: list[Progress] = []
    curve(GRAPH, [PEAK_BYTES - 50, PEAK_BYTES - 100], SnapshotRefinement(5.0, work_limit=3), events.append)
    assert events[0].stage == "budget 1 of 2, starting"
    assert events[0].time_limit_seconds == 10.0
    assert events[-1].stage.startswith("budget 2 of 2")
    assert events[-1].time_limit_seconds == 5.0


@pytest.mark.parametrize("within", [False, True])
def test_the_largest_batch(within: bool) -> None:
    found = max_batch_size(Net(), "1GiB", inputs, solver=Interrupted(3, within))
    assert found.interrupted
    assert not found.proven
    assert not found.limit_reached
    assert found.batch == (4 if within else 2)
    with pytest.raises(KeyboardInterrupt):
        max_batch_size(Net(), "1GiB", inputs, solver=Interrupted(1))
    stages: list[str] = []
    whole = max_batch_size(
        Net(), "1GiB", inputs, solver=SOLVER, limit=2, progress=lambda event: stages.append(event.stage)
    )
    assert not whole.interrupted
    assert stages[0] == "batch 1, capturing"
    assert "batch 2, capturing; 1 fits" in stages


def test_auto_while_it_asks_checkmate() -> None:
    solver = Auto(gap=0.0, work_limit=1)
    whole = solver.solve(SKIPS, 99)
    cut = solver.solve(SKIPS, 99, Hints(progress=pressed("asking Checkmate")))
    assert cut.interrupted
    assert cut.schedule is not None
    assert cut.lower_bound <= whole.overhead <= cut.overhead


def test_local_search() -> None:
    known = ChenGreedy().solve(GRAPH, PEAK_BYTES - 100).schedule
    assert known is not None
    found = LocalSearch(move_limit=1000).solve(
        GRAPH, PEAK_BYTES - 100, Hints(schedules=(known,), progress=pressed("walk 1"))
    )
    assert found.interrupted
    assert found.hit_limit
    assert found.schedule is not None
    assert found.message == "interrupted: the best schedule so far"


def test_a_certificate_proves_what_is_proven_by_then() -> None:
    solution = SnapshotRefinement(work_limit=3).solve(GRAPH, PEAK_BYTES - 100)
    whole = certify(GRAPH, PEAK_BYTES - 100, solution).report
    events: list[Progress] = []
    certify(GRAPH, PEAK_BYTES - 100, solution, progress=events.append)
    assert events[0].overhead == solution.overhead
    cut = certify(GRAPH, PEAK_BYTES - 100, solution, progress=pressed("cuts 0")).report
    assert cut.overhead == whole.overhead
    assert cut.bound <= whole.bound
