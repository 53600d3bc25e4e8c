"""The smallest budget that works: minimum peak memory, the memory floor, the least feasible budget, pebbling number.

Which budget is the smallest that any schedule meets, whatever the recomputation costs? The answer is an interval:

* from above, a schedule and its simulated peak: the best that the chain solvers and the probes of the search met;
* from below, two bounds that speak of different schedules. The *order-free* floor is what the neediest operator needs
  by itself, in whatever order (:func:`solvers.solution.memory_floor`). Above it, a budget counts as excluded if a
  solver of the *ordered* class proves it infeasible (:mod:`solvers.snapshot`): for schedules that keep the captured
  order of first executions, so another order may do with less.

Feasibility is monotone in the budget. So a first bisection looks for the least budget that the solver meets, a second
one for the largest that it excludes. Between the two are budgets at which it found neither schedule nor proof; the
problem is PSPACE-hard (it contains pebbling), and no time limit closes every gap.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from graph_capture.formats import format_bytes, format_fraction
from graph_capture.graph import Graph
from solvers.chain_starts import chain_suggestions
from solvers.heterogeneous_chain import HeterogeneousChain
from solvers.hints import Hints, Progress, ProgressListener
from solvers.schedule import Schedule
from solvers.solution import SearchClass, Solver, Status, memory_floor
from solvers.verdict import EVERY_SCHEDULE, Candidate, judge

CHAIN_SHARE = 0.25
"""The part of the time that the solvers of chains may take, which have no limit of their own."""


@dataclass(frozen=True)
class MinimumBudget:
    """The smallest peak known, and below what no schedule goes.

    **Fields:**

    - `schedule`, `peak_bytes`, `overhead`: the schedule of least peak that was met.
    - `lower_bound_bytes`: no schedule of `bound_scope` has a smaller peak.
    - `floor_bytes`, `floor_operator`: the order-free floor, and the operator that sets it (`None` if nothing but the
      resident memory does, in a graph without operators).
    - `probes`: how many budgets were tried. `hit_limit`: whether the search was stopped with the interval still open.
    """

    schedule: Schedule
    peak_bytes: int
    overhead: float
    lower_bound_bytes: int
    bound_scope: str
    floor_bytes: int
    floor_operator: int | None
    probes: int
    seconds: float
    hit_limit: bool

    def __str__(self) -> str:
        lines = [
            f"smallest budget known to work  {format_bytes(self.peak_bytes)}",
            f"overhead there                 {format_fraction(self.overhead)}",
            f"nothing fits below             {format_bytes(self.lower_bound_bytes)} (of {self.bound_scope})",
            f"order-free floor               {format_bytes(self.floor_bytes)}",
            f"budgets tried                  {self.probes} in {self.seconds:.1f} s"
            + (", stopped at a limit" if self.hit_limit else ""),
        ]
        return "\n".join(lines)

    @property
    def gap(self) -> float:
        """How far the peak may be above the smallest one, as a fraction of the peak."""
        return (self.peak_bytes - self.lower_bound_bytes) / self.peak_bytes if self.peak_bytes else 0.0


@dataclass
class _Search:
    """The interval while it shrinks."""

    graph: Graph
    solver: Solver
    until: float
    max_probes: int
    best: Candidate
    excluded_below: int  # no schedule of the scope has a peak below
    scope: str = EVERY_SCHEDULE
    progress: ProgressListener | None = None
    started: float = 0.0
    probes: int = 0
    stopped: bool = False

    def report(self, stage: str) -> None:
        """Tell the listener, if there is one, where the interval stands."""
        if self.progress is None:
            return
        self.progress(
            Progress(
                solver="minimum budget",
                stage=stage,
                seconds=time.monotonic() - self.started,
                time_limit_seconds=self.until - self.started,
                overhead=self.best.overhead,
                lower_bound=0.0,
                peak_bytes=self.best.peak_bytes,
                lower_bound_bytes=min(self.excluded_below, self.best.peak_bytes),
            )
        )

    def probe(self, budget_bytes: int) -> None:
        """Ask the solver for any schedule within the budget, and learn from its answer."""
        self.probes += 1
        self.report(f"probe {self.probes}: {budget_bytes:,} bytes")
        # What is known nearly fits a budget that is a little smaller: a place to start from.
        solution = self.solver.solve(self.graph, budget_bytes, Hints(schedules=(self.best.schedule,)))
        self.stopped = self.stopped or solution.interrupted
        if solution.schedule is not None:
            self.take(solution.schedule)
            return
        proven = solution.status is Status.INFEASIBLE and solution.search_class is SearchClass.ORDERED
        if proven and budget_bytes + 1 > self.excluded_below:
            self.excluded_below, self.scope = budget_bytes + 1, solution.bound_scope

    def take(self, schedule: Schedule) -> None:
        """Judge a schedule; keep it if its peak is the smallest."""
        candidate = judge(self.graph, schedule)
        if candidate.peak_bytes < self.best.peak_bytes:
            self.best = candidate

    def may_probe(self) -> bool:
        """Whether probes and time are left."""
        self.stopped = self.stopped or self.probes >= self.max_probes or time.monotonic() >= self.until
        return not self.stopped

    def descend(self, low: int, tolerance: float) -> None:
        """The least budget from `low` on that the solver meets."""
        while self.best.peak_bytes - low > tolerance * self.best.peak_bytes and self.may_probe():
            middle = (low + self.best.peak_bytes - 1) // 2
            before = self.best.peak_bytes
            self.probe(middle)
            if self.best.peak_bytes == before:
                low = middle + 1

    def exclude(self, tolerance: float) -> None:
        """The largest budget that the solver excludes."""
        high = self.best.peak_bytes
        while high - self.excluded_below > tolerance * self.best.peak_bytes and self.may_probe():
            middle = (self.excluded_below + high - 1) // 2
            before = self.excluded_below
            self.probe(middle)
            high = min(high, self.best.peak_bytes) if self.excluded_below > before else middle


def minimum_budget(
    graph: Graph,
    solver: Solver | None = None,
    *,
    time_limit_seconds: float = 60.0,
    max_probes: int = 24,
    tolerance: float = 1e-3,
    start: tuple[Schedule, ...] = (),
    progress: ProgressListener | None = None,
) -> MinimumBudget:
    """The smallest peak of any schedule of `graph`, as far as the limits allow; at Ctrl-C, what is known by then.

    **Arguments:**

    - `solver`: looks for schedules and proofs; its proofs count if its class is the ordered one. The default is
      snapshot refinement, content with any schedule, with an eighth of the time per budget.
    - `time_limit_seconds`: no budget is tried after it; one that has begun is finished. The solvers of chains,
      which are asked first, end after a quarter of it.
    - `max_probes`: how many budgets are tried: deterministic, if the solver is and no limit of time is met.
    - `tolerance`: stop where schedule and bound differ by no more than this fraction of the peak.
    - `start`: schedules that are known already: the search goes down from the one of least peak.
    """
    started = time.monotonic()
    if solver is None:
        from solvers.snapshot import SnapshotRefinement

        solver = SnapshotRefinement(time_limit_seconds=max(0.1, time_limit_seconds / 8), gap=100.0)
    floor_bytes, operator = memory_floor(graph)
    best = judge(graph, Schedule.store_all(graph))
    search = _Search(graph, solver, started + time_limit_seconds, max_probes, best, floor_bytes)
    search.progress, search.started = progress, started
    for schedule in start:
        search.take(schedule)
    try:
        _run(search, tolerance, started + CHAIN_SHARE * time_limit_seconds)
    except KeyboardInterrupt:  # store-all at least is known, and that the search ended early is said
        search.stopped = True
    best = search.best
    return MinimumBudget(
        schedule=best.schedule,
        peak_bytes=best.peak_bytes,
        overhead=best.overhead,
        lower_bound_bytes=min(search.excluded_below, best.peak_bytes),
        bound_scope=search.scope,
        floor_bytes=floor_bytes,
        floor_operator=operator if len(graph) else None,
        probes=search.probes,
        seconds=time.monotonic() - started,
        hit_limit=search.stopped,
    )


def _run(search: _Search, tolerance: float, chain_until: float) -> None:
    if search.best.peak_bytes > search.excluded_below:
        search.report("asking the solvers of chains")
        _ask_chains(search, chain_until)
    search.descend(search.excluded_below, tolerance)
    search.exclude(tolerance)


def _ask_chains(search: _Search, until: float) -> None:
    """The plan of least peak that the solvers of chains make for the least budget that may work."""
    from solvers.snapshot.anneal import LateAnnealer  # late: they bring compiled code with them
    from solvers.snapshot.incumbent import Incumbent

    graph = search.graph
    suggested = (s.order for s in chain_suggestions(graph, search.excluded_below))
    thorough = HeterogeneousChain().orders(graph, search.excluded_below)
    met = Incumbent(graph, search.excluded_below, search.best.peak_bytes, LateAnnealer(graph))
    for order in itertools.chain(suggested, thorough):
        if time.monotonic() >= until:
            break
        met.offer(list(order), "chains")
    if met.lowest is not None:
        search.take(Schedule.from_order(graph, met.lowest))
