"""Turns the schedules that a solver met into a :class:`~solvers.solution.Solution`.

Every solver ends in the same few ways; this is the one place that words them. A schedule enters only through
:func:`judge`, that is through the simulator, so that no solver can return what it merely believes to fit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from graph_capture.graph import Graph
from solvers.schedule import Schedule
from solvers.solution import SearchClass, Solution, Solver, Status, memory_floor, overhead_of
from solvers.turn import released_order

EVERY_SCHEDULE = "every schedule, in whatever order"
INTERRUPTED = "interrupted: the best schedule so far"
COUNTED_EXECUTIONS = 2_000
"""From so many executions in all on, orders are counted in compiled code before a few are judged."""

TOLERANCE = 1e-6
"""Overhead and bound that differ by no more than this fraction of the step count as equal."""


@dataclass(frozen=True)
class Candidate:
    """A legal schedule with what the simulator says about it."""

    schedule: Schedule
    overhead: float
    peak_bytes: int


def judge(graph: Graph, schedule: Schedule) -> Candidate:
    """Replay `schedule`; raises :class:`~solvers.simulator.ScheduleError` if it is not legal.

    What it holds across the turn and must not (:mod:`solvers.turn`) is recomputed first.
    """
    if graph.released:
        schedule = Schedule.from_order(graph, released_order(graph, schedule.order))
    return Candidate(schedule, *overhead_of(graph, schedule))


def judge_best(graph: Graph, orders: Iterable[Sequence[int]], budget_bytes: int) -> list[Candidate]:
    """Judge those of many orders of executions that matter: the cheapest that fits, and the one of smallest peak.

    Many orders, or orders of large graphs, are counted in compiled code first (which may count more memory than the
    simulator where a gradient is read again, never less), and the simulator judges the few that come out on top.
    Without numba all are judged. Orders keep captured first executions.
    """
    orders = [released_order(graph, order) for order in orders]
    counter = None
    if len(graph) * len(orders) >= COUNTED_EXECUTIONS:
        from solvers.snapshot.anneal import LateAnnealer

        counter = LateAnnealer(graph)()
    if counter is None:
        return [judge(graph, Schedule.from_order(graph, order)) for order in orders]
    counted: list[tuple[float, int, Sequence[int]]] = []
    for order in orders:
        percent, peak_bytes, _ = counter.evaluate(order)
        counted.append((percent, peak_bytes, order))
    judged: list[Candidate] = []
    for _, peak_bytes, order in sorted(counted, key=lambda row: row[:2]):
        if peak_bytes <= budget_bytes:
            judged.append(judge(graph, Schedule.from_order(graph, order)))
            if judged[-1].peak_bytes <= budget_bytes:
                break
    if counted:
        smallest = min(counted, key=lambda row: (row[1], row[0]))
        judged.append(judge(graph, Schedule.from_order(graph, smallest[2])))
    return judged


def cheapest(candidates: Iterable[Candidate], budget_bytes: int) -> Candidate | None:
    """The candidate of least overhead within the budget, of least peak among equals."""
    fitting = (c for c in candidates if c.peak_bytes <= budget_bytes)
    return min(fitting, key=lambda c: (c.overhead, c.peak_bytes), default=None)


@dataclass(frozen=True)
class Verdict:
    """One solve on its way to a solution: who solves what, under which claim, since when."""

    solver: Solver
    graph: Graph
    budget_bytes: int
    search_class: SearchClass
    bound_scope: str
    started: float

    @classmethod
    def start(
        cls,
        solver: Solver,
        graph: Graph,
        budget_bytes: int,
        search_class: SearchClass,
        bound_scope: str = EVERY_SCHEDULE,
    ) -> Verdict:
        """Begin to measure the seconds of a solve."""
        return cls(solver, graph, budget_bytes, search_class, bound_scope, time.perf_counter())

    @property
    def below_floor(self) -> bool:
        """Whether one operator alone needs more than the budget: no schedule of any order fits."""
        return self.budget_bytes < memory_floor(self.graph)[0]

    def about(self, bound_scope: str) -> Verdict:
        """The same solve with another scope of its bound."""
        return replace(self, bound_scope=bound_scope)

    def conclude(
        self,
        candidates: Sequence[Candidate],
        *,
        lower_bound: float = 0.0,
        infeasible: bool = False,
        hit_limit: bool = False,
        interrupted: bool = False,
        message: str = "",
        trace: tuple[str, ...] = (),
    ) -> Solution:
        """The solution: the cheapest candidate that fits, or the reason why there is none.

        **Arguments:**

        - `candidates`: every schedule that was met; those over the budget tell what budget would do.
        - `lower_bound`: holds for every schedule of `bound_scope` within the budget.
        - `infeasible`: whether it is proven that no schedule of `bound_scope` fits.
        - `interrupted`: whether Ctrl-C ended the search, which counts as a limit.
        """
        if interrupted:
            found = self.conclude(candidates, lower_bound=lower_bound, hit_limit=True, trace=trace)
            return replace(found, interrupted=True, message=INTERRUPTED)
        best = cheapest(candidates, self.budget_bytes)
        smallest = min((c.peak_bytes for c in candidates), default=None)
        floor_bytes, floor_operator = memory_floor(self.graph)
        if best is not None:
            # The bound may exceed the overhead by what the engine tolerates, never by more.
            lower_bound = min(lower_bound, best.overhead)
            status = Status.OPTIMAL if best.overhead <= lower_bound + TOLERANCE else Status.FEASIBLE
            return self._solution(status, best, lower_bound, hit_limit, message, smallest, None, trace)
        below = self.budget_bytes < floor_bytes
        if below or infeasible:
            floor = floor_operator if below and len(self.graph) else None
            message = message if infeasible and not below else self._below_floor(floor_bytes, floor)
            return self._solution(Status.INFEASIBLE, None, math.inf, hit_limit, message, smallest, floor, trace)
        message = message or f"nothing found within {self.budget_bytes:,} bytes"
        return self._solution(Status.UNKNOWN, None, lower_bound, hit_limit, message, smallest, None, trace)

    def not_applicable(self, reason: str) -> Solution:
        """The solution of a solver that does not apply to the graph."""
        return self._solution(Status.NOT_APPLICABLE, None, 0.0, False, reason, None, None, ())

    def _below_floor(self, floor_bytes: int, operator: int | None) -> str:
        at = f"operator {self.graph.operators[operator].name}" if operator is not None else "what is resident"
        return f"{at} alone needs {floor_bytes:,} bytes, the budget is {self.budget_bytes:,}"

    def _solution(
        self,
        status: Status,
        best: Candidate | None,
        lower_bound: float,
        hit_limit: bool,
        message: str,
        smallest: int | None,
        floor_operator: int | None,
        trace: tuple[str, ...],
    ) -> Solution:
        return Solution(
            solver=self.solver.name,
            status=status,
            schedule=best.schedule if best else None,
            overhead=best.overhead if best else math.inf,
            lower_bound=lower_bound,
            predicted_peak_bytes=best.peak_bytes if best else 0,
            search_class=self.search_class,
            bound_scope=self.bound_scope,
            seconds=time.perf_counter() - self.started,
            hit_limit=hit_limit,
            message=message,
            smallest_known_budget_bytes=smallest,
            floor_operator=floor_operator,
            trace=trace,
        )
