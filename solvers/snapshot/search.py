"""The loop of snapshot refinement: relax, solve, lift, judge, mend, and ask at more instants."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from solvers.hints import Hints, Progress
from solvers.simulator import Simulation
from solvers.snapshot.anneal import Annealer, LateAnnealer
from solvers.snapshot.engine import Answer, EnginePool, Limits, Outcome
from solvers.snapshot.excess import Excess, excess_of
from solvers.snapshot.incumbent import Incumbent, percent_of
from solvers.snapshot.lift import lift
from solvers.snapshot.project import project
from solvers.snapshot.reduction import Reduction
from solvers.snapshot.relaxation import PERCENT, Relaxation, build
from solvers.snapshot.suggestions import Suggestions
from solvers.snapshot.walks import MENDABLE, Walks
from solvers.snapshot.windows import MOST_ROWS
from solvers.turn import released_order

if TYPE_CHECKING:
    from solvers.snapshot.refinement import SnapshotRefinement

BOUND_MARGIN_PERCENT = 1e-4
"""Subtracted from every dual bound: the engines' dual feasibility tolerance (1e-7 per column), with room to spare."""

OPTIMALITY_TOLERANCE = 2e-6
"""A gap below this fraction of the step counts as closed: the margin of the bound, and the engines' absolute gap."""

ALL_ROWS_LIMIT = 500
"""Up to so many operators every position has a memory row from the start; above, rows come where they are violated."""

INSTANTS_PER_ROUND, INSTANTS_APART, CAREFUL_ROUNDS = 2, 8, 2
"""New instants of a round, at least so many operators apart; twice as many after the first rounds,
or while nothing fits. Few instants keep the MILP solvable, many bring its points closer to a schedule."""

REPAIRABLE, REPAIRABLE_AT_A_LIMIT, REPAIRS_PER_ROUND = 1.1, 1.01, 3
"""A lifted sequence below this multiple of the budget is first repaired by charging its excess to the MILP; where the
MILP was stopped by its limit, only a very small excess is worth another one."""

SURCHARGE_STEPS = (3e-4, 1e-5)
"""Least surcharge, as a fraction of the budget: less than a value's size would change nothing. Where that leaves no
point, close above the smallest budget that works, a finer one may."""

SURVEY_ROUND, SURVEY_SHARE, SURVEY_ROWS = 3, 0.4, 30_000
"""From which round on, once a schedule fits, the question is put at instants all over the backward pass, for which
share of the time limit, and up to how many rows there may be one more window."""

SURVEY_SIZE, SURVEY_SIZE_PER_SECOND = 24_000, 800
"""The square of a survey's instants, times the values that something is decided about (its program has about as many
rows): at most, and for each second of the time limit."""

NODES_PER_ROUND = 500
"""Branch-and-bound nodes of one round under a `work_limit`."""

FLOOR_FACTORS = (1.0, 1.03, 1.1, 1.25, 1.5)
"""Multiples of the largest budget known to be impossible at which a schedule is looked for."""


@dataclass
class Search:
    """One solve under way; percent means percent of the store-all step."""

    options: SnapshotRefinement
    reduction: Reduction
    budget_bytes: int
    baseline: Simulation
    pool: EnginePool
    began: float
    hints: Hints
    lower_bound: float = 0.0
    infeasible: bool = False
    relative_gap: float = 1e-2
    rounds: int = 0
    hit_limit: bool = False
    interrupted: bool = False
    surveyed: bool = False
    surcharge_bytes: dict[int, int] = field(default_factory=dict[int, int])
    trace: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.graph = self.reduction.graph
        start = max(0, self.graph.last_forward)
        if start == len(self.graph) - 1:  # there is no backward pass
            start = 0
        profile = self.baseline.timeline_bytes
        self.instants = {0, max(range(start, len(profile)), key=profile.__getitem__)}
        if self.graph.released:
            self.instants.add(self.graph.last_forward + 1)  # the turn, where they must not be there
        self.rows: set[int] | None = set() if len(self.graph) > ALL_ROWS_LIMIT else None
        self.bursts: set[int] = set()
        self.late_annealer = LateAnnealer(self.graph, wait=self.options.work_limit is not None)
        self.incumbent = Incumbent(self.graph, self.budget_bytes, self.baseline.peak_bytes, self.late_annealer)
        if self.graph.released:  # the store-all schedule is not allowed; mended, it is
            self.incumbent.smallest_peak_bytes = sys.maxsize
            self.incumbent.consider(list(range(len(self.graph))), "store-all, mended")
        self.walks = Walks(self)
        self.unmended: list[int] | None = None  # the last lifted sequence that did not fit, but not by far
        self.lower_bound = PERCENT * self.hints.lower_bound
        for schedule in self.hints.schedules:
            self.incumbent.offer(list(schedule.order), "what was known")
        self.suggestions = Suggestions(self)

    @property
    def annealer(self) -> Annealer | None:
        """`None` without numba, and while its code is being compiled; under a work limit that is waited for."""
        return self.late_annealer()

    # ---------------------------------------------------------------- limits

    def remaining_seconds(self) -> float:
        """Seconds until the time limit."""
        return self.options.time_limit_seconds - (time.monotonic() - self.began)

    def reached(self, percent: float) -> bool:
        """Whether an overhead is as close to the lower bound as was asked for."""
        return percent - self.lower_bound <= PERCENT * max(self.options.gap, OPTIMALITY_TOLERANCE)

    def closed(self) -> bool:
        """Whether the best schedule has the gap that was asked for."""
        return self.reached(self.incumbent.percent)

    def near(self, percent: float) -> float:
        """An objective that is as close to `percent` as the present gap of the MILPs asks for."""
        return percent * (1.0 + self.relative_gap) + 0.1 * PERCENT * self.options.gap

    def exhausted(self) -> bool:
        """Whether a limit is reached; remembers it for the solution."""
        limit = self.options.work_limit
        self.hit_limit = self.remaining_seconds() <= 0.0 or (limit is not None and self.rounds >= limit)
        return self.hit_limit

    def log(self, text: str) -> None:
        """Add a line to the trace, and tell the listener."""
        seconds = time.monotonic() - self.began
        bound, best, limit = (
            self.lower_bound / PERCENT,
            self.incumbent.percent / PERCENT,
            self.options.time_limit_seconds,
        )
        self.hints.report(Progress(self.options.name, f"round {self.rounds}: {text}", seconds, limit, best, bound))
        gap = f"{self.lower_bound:.3f} .. {self.incumbent.percent:.3f}"
        self.trace.append(f"{seconds:7.2f} s  round {self.rounds}  [{gap}]  {text}")

    # ---------------------------------------------------------------- the loop

    def run(self) -> None:
        """Refine until the gap is closed, the budget is proven infeasible, a limit is reached, or Ctrl-C is pressed.

        An interrupt ends the search with the best schedule so far; where there is none, it goes on to the caller.
        """
        try:
            self._refine_until_done()
        except KeyboardInterrupt:
            if self.incumbent.order is None:
                raise
            self.interrupted = self.hit_limit = True

    def _refine_until_done(self) -> None:
        while not self.exhausted() and not self.closed() and not self.infeasible:
            self.rounds += 1
            relaxation = self.relaxation()
            answer = self.ask(relaxation)
            self.raise_bound(answer)
            if self.infeasible:
                return
            over = self.learn(self.lifted(relaxation, answer), answer) if answer.has_point else Excess()
            if not self.closed():
                self.suggestions.consider()
            if self.incumbent.order is None:
                self.walks.approach(0.12 * self.options.time_limit_seconds)
            if not self.closed() and not self.refine(over, answer):
                self.polish_further()
            if self.rounds >= SURVEY_ROUND and not (self.surveyed or self.closed()):
                self.survey()

    def relaxation(
        self,
        rows: set[int] | None = None,
        surcharge_bytes: Mapping[int, int] | None = None,
        window_rows: int = MOST_ROWS,
    ) -> Relaxation:
        """The relaxation as it stands; `rows` in the place of those at hand."""
        rows = self.rows if rows is None else rows
        return build(
            self.reduction, self.budget_bytes, self.instants, rows, surcharge_bytes, window_rows, bursts=self.bursts
        )

    def raise_bound(self, answer: Answer) -> None:
        """What the answer to a relaxation proves: a bound, or that nothing fits."""
        if answer.outcome is Outcome.INFEASIBLE:
            self.infeasible = True
        elif math.isfinite(answer.dual_bound):
            self.lower_bound = max(self.lower_bound, answer.dual_bound - BOUND_MARGIN_PERCENT)

    def survey(self) -> None:
        """Once a schedule fits: ask at instants spread over the backward pass; if that proves more, go on from them.

        At small budgets memory binds everywhere, and lifted sequences point to a few places of one neighbourhood.
        """
        if self.incumbent.order is None or self.exhausted():
            return
        self.surveyed = True
        before, instants = self.lower_bound, self.instants
        self.instants = {0, *self.widest_of_stretches()}
        if self.graph.released:
            self.instants.add(self.graph.last_forward + 1)
        relaxation = self.relaxation(window_rows=SURVEY_ROWS)
        answer = self.ask(relaxation, SURVEY_SHARE * self.options.time_limit_seconds)
        self.raise_bound(answer)
        over = self.learn(self.lifted(relaxation, answer), answer) if answer.has_point else Excess()
        if self.lower_bound > before:
            self.refine(over, answer)
        else:
            self.instants = instants

    def widest_of_stretches(self) -> list[int]:
        """The operators that need most by themselves, one in each of as many stretches as the MILP has room for."""
        begin, end = self.graph.last_forward + 1, len(self.graph)
        if begin >= end:  # there is no backward pass
            begin = 0
        size = min(SURVEY_SIZE, int(SURVEY_SIZE_PER_SECOND * self.options.time_limit_seconds))
        count = min(end - begin, math.isqrt(size // max(1, len(self.reduction.flexible))))
        edges = [begin + (end - begin) * k // count for k in range(count + 1)] if count else []
        return [max(range(*stretch), key=self.reduction.floor_bytes) for stretch in itertools.pairwise(edges)]

    def ask(self, relaxation: Relaxation, most_seconds: float = math.inf, relative_gap: float | None = None) -> Answer:
        """Solve one relaxation, loosely: its bound and its point both only have to be good enough to go on."""
        share = max(3.0, 0.5 * self.remaining_seconds())
        limits = Limits(
            time_limit_seconds=max(0.1, min(share, most_seconds, self.remaining_seconds())),
            relative_gap=self.relative_gap if relative_gap is None else relative_gap,
            absolute_gap=max(1e-6, 0.1 * PERCENT * self.options.gap),
            target=self.near(self.lower_bound) if self.lower_bound > 0.0 else None,
            seed=self.options.seed,
        )
        if self.options.work_limit is not None:
            seconds = max(0.1, self.remaining_seconds())
            limits = dataclasses.replace(limits, node_limit=NODES_PER_ROUND, time_limit_seconds=seconds)
        start = project(self.reduction, relaxation, self.incumbent.order) if self.incumbent.order is not None else None
        self.pool.submit(relaxation.program.serialized(), limits, start)
        answer = self.pool.poll(0.3)
        while answer is None:
            self.use_the_time(limits.time_limit_seconds)
            answer = self.pool.poll(0.2)
        self.log(
            f"MILP {len(relaxation.program.costs)} columns, {len(relaxation.program.row_lower)} rows, "
            f"{len(relaxation.instants)} instants: {answer.outcome.name} {answer.objective:.3f} "
            f"(bound {answer.dual_bound:.3f}) by {answer.engine} in {answer.seconds:.2f} s"
        )
        return answer

    def use_the_time(self, most_seconds: float) -> None:
        """Try suggestions and anneal while an engine works; not under a work limit: nothing may depend on the clock."""
        if self.options.work_limit is not None:
            return
        if self.annealer is None and self.suggestions.slow_to_judge:
            # slowly, by the simulator: there is nothing else to do until the code is compiled, or the engine answers
            self.suggestions.consider(stop=lambda: self.pool.answered() or self.annealer is not None)
            return
        self.suggestions.consider(stop=self.pool.answered)
        seconds = min(0.12 * self.options.time_limit_seconds, most_seconds)
        if self.unmended is not None:
            start, self.unmended = self.unmended, None
            self.walks.mend(start, seconds, in_between=True)
        elif self.incumbent.order is not None:
            self.walks.polish(seconds, in_between=True)

    def lifted(self, relaxation: Relaxation, answer: Answer) -> list[int]:
        """The better of the two lifts of a point: the cheaper one of those that fit, else the one with less excess."""
        lifts = [lift(self.reduction, relaxation, answer.columns, early_drops=early) for early in (False, True)]
        orders = [released_order(self.graph, order) for order in lifts]
        if orders[0] == orders[1]:
            return orders[0]

        def rank(order: list[int]) -> tuple[int, float]:
            simulation = self.incumbent.consider(order)
            excess = max(0, simulation.peak_bytes - self.budget_bytes)
            return excess, simulation.recomputed_seconds

        return min(orders, key=rank)

    def learn(self, order: list[int], answer: Answer) -> Excess:
        """Judge a lifted sequence and mend it; returns where it went over the budget."""
        simulation = self.incumbent.consider(order)
        ratio = simulation.peak_bytes / self.budget_bytes
        over = excess_of(self.graph, order, simulation, self.budget_bytes)
        self.log(f"lifted: {percent_of(self.graph, simulation):.3f} % at {ratio:.5f} of the budget")
        good = answer.outcome is Outcome.OPTIMAL or answer.objective <= self.near(self.near(self.lower_bound))
        if 1.0 < ratio < (REPAIRABLE if good and self.rounds == 1 else REPAIRABLE_AT_A_LIMIT):
            self.repair(over)
        if ratio > 1.0 and not self.closed() and (ratio < MENDABLE or self.rounds > 4):
            self.unmended = order
            if ratio < REPAIRABLE or self.incumbent.order is None:
                self.walks.mend(order, max(1.0, 0.12 * self.options.time_limit_seconds))
        return over

    def repair(self, over: Excess) -> None:
        """Charge what a lifted sequence had too much to the positions where it had it, and solve and lift again.

        The excess comes from what the relaxation does not count: tiny values, and bursts of recomputation.
        """
        for step in SURCHARGE_STEPS:
            if self.repaired(over, int(step * self.budget_bytes)):
                return

    def repaired(self, over: Excess, step_bytes: int) -> bool:
        """Repair with so much charged at least; `False` where that is too much for any point."""
        for _ in range(REPAIRS_PER_ROUND):
            if not over or self.remaining_seconds() <= 0.0:
                return True
            for j, live in over.at.items():
                charged = self.surcharge_bytes.get(j, 0)  # where charging the excess did not help, charge more and more
                self.surcharge_bytes[j] = max(3 * charged, charged + live - self.budget_bytes + step_bytes)
            rows = None if self.rows is None else self.rows | set(self.surcharge_bytes)
            relaxation = self.relaxation(rows, surcharge_bytes=self.surcharge_bytes)
            answer = self.ask(relaxation, most_seconds=max(2.0, 0.1 * self.options.time_limit_seconds))
            if not answer.has_point:
                self.surcharge_bytes.clear()
                return answer.outcome is not Outcome.INFEASIBLE
            order = self.lifted(relaxation, answer)
            simulation = self.incumbent.consider(order)
            self.log(f"repaired: {percent_of(self.graph, simulation):.3f} %, {simulation.peak_bytes} bytes")
            over = excess_of(self.graph, order, simulation, self.budget_bytes)
        return True

    def refine(self, over: Excess, answer: Answer) -> bool:
        """Add the worst positions, apart from each other, as instants, and rows at local maxima and in bursts."""
        if answer.has_point and answer.objective - answer.dual_bound > 0.5 * (
            self.incumbent.percent - self.lower_bound
        ):
            self.relative_gap = max(self.relative_gap / 2, 1e-5)
        careful = self.rounds == 1 or (self.rounds <= CAREFUL_ROUNDS and self.incumbent.order is not None)
        most = INSTANTS_PER_ROUND if careful else 2 * INSTANTS_PER_ROUND
        fresh = over.worst(most, INSTANTS_APART, self.instants)
        self.instants.update(fresh)
        if self.rows is not None:
            self.rows |= over.local_maxima()
        news = bool(fresh) or not self.bursts.issuperset(over.reruns)
        self.bursts.update(over.reruns)
        return news

    def polish_further(self) -> None:
        """Nothing new to ask: a tighter MILP next time, and the schedule at hand is annealed once more."""
        self.relative_gap = max(self.relative_gap / 2, 1e-5)
        if self.incumbent.order is not None and not self.exhausted():
            self.walks.polish(max(1.0, 0.2 * self.options.time_limit_seconds))

    # ---------------------------------------------------------------- infeasible budgets

    def look_for_a_larger_budget(self, floor_bytes: int) -> None:
        """A quick look for the smallest budget that works: one loose MILP and one lift at each of a few sizes."""
        impossible = max(floor_bytes, self.budget_bytes)
        most_seconds = 0.1 * self.options.time_limit_seconds
        for factor in FLOOR_FACTORS:
            size_bytes = int(impossible * factor)
            if size_bytes >= self.incumbent.smallest_peak_bytes or self.remaining_seconds() <= 0.0:
                return
            relaxation = build(self.reduction, size_bytes, self.instants, self.rows)
            answer = self.ask(relaxation, most_seconds, relative_gap=5e-2)
            if answer.has_point:
                simulation = self.incumbent.consider(lift(self.reduction, relaxation, answer.columns))
                self.log(f"with {size_bytes} bytes: a schedule that needs {simulation.peak_bytes}")
