"""Any solver on a better order of first executions.

Where a graph leaves freedom in its order (graphs without a backward pass above all), the order alone may lower the
peak below the budget, at no cost. So look for a better one first (:mod:`solvers.ordering`). If it fits, nothing is
recomputed: optimal, whatever the order. Otherwise :class:`~solvers.local_search.LocalSearch` looks for a schedule,
and may change the order again; and a solver of the ordered class works on the graph in the order of that schedule's
first executions, with the schedule as a hint.

*Search class*: free. *Bound*: only what holds for every schedule: 0, or infeasible below the memory floor. What the
solver proves speaks of the order that it was given; the message says it, and the solution's lower bound does not
contain it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from graph_capture.graph import Graph
from solvers.hints import NO_HINTS, Hints
from solvers.local_search import LocalSearch
from solvers.ordering import OrderSearch, reordered
from solvers.precedence import first_runs, violation
from solvers.registry import solver_class
from solvers.schedule import Schedule
from solvers.solution import SearchClass, Solution, Solver, Status
from solvers.verdict import Candidate, Verdict, cheapest, judge

MOVES_PER_UNIT = 100_000
"""Moves of the local search for one unit of `work_limit`."""


@dataclass(frozen=True)
class Reordered(Solver):
    """A better order first; then local search; then `solver` on the order that this found.

    **Fields:**

    - `solver`: name of the solver that works on the better order (see :mod:`solvers.registry`).
    - `time_limit_seconds`: wall-clock limit; a quarter at most goes to the order, half of the rest to `solver`.
    - `gap`, `seed`, `work_limit`: handed on to `solver` if it has such options; `work_limit` limits all parts, and
      makes the result the same on every machine.
    """

    solver: str = "snapshot"
    time_limit_seconds: float = 30.0
    gap: float = 1e-3
    seed: int = 0
    work_limit: int | None = None
    name: ClassVar[str] = "reordered"

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """See :meth:`solvers.solution.Solver.solve`."""
        began = time.monotonic()
        verdict = Verdict.start(self, graph, budget_bytes, SearchClass.FREE)
        legal = (s for s in hints.schedules if violation(graph, s.order) is None)
        candidates = [judge(graph, s) for s in (Schedule.store_all(graph), *legal)]
        if verdict.below_floor or any(c.overhead == 0 and c.peak_bytes <= budget_bytes for c in candidates):
            return verdict.conclude(candidates)
        if find_spec("numba"):
            from solvers.free_order.annealer import warm_up

            warm_up()
            began = time.monotonic()
        found = self._order_search().best(graph, budget_bytes)
        candidates.append(judge(graph, Schedule.from_order(graph, found.order)))
        trace = [f"order by {found.search}: peak {found.peak_bytes:,} bytes, captured {candidates[0].peak_bytes:,}"]
        if found.peak_bytes <= budget_bytes and not graph.released:
            return verdict.conclude(candidates, message="another order: nothing is recomputed", trace=tuple(trace))
        walked = self._walk(graph, budget_bytes, candidates, began, hints)
        trace += [f"{walked.solver}: {line}" for line in walked.trace]
        candidates += [] if walked.schedule is None else [judge(graph, walked.schedule)]
        best = cheapest(candidates, budget_bytes)
        if best is not None and best.overhead == 0:
            return verdict.conclude(candidates, message="another order: nothing is recomputed", trace=tuple(trace))
        if walked.interrupted:
            return verdict.conclude(candidates, interrupted=True, trace=tuple(trace))
        reordering = reordered(graph, found.order if best is None else first_runs(best.schedule.order))
        known = () if best is None else (reordering.schedule_of_graph(best.schedule),)
        inner = self._inner(began).solve(
            reordering.graph, budget_bytes, Hints(schedules=known, progress=hints.progress)
        )
        trace += [f"{inner.solver} on this order: {line}" for line in inner.trace]
        if inner.schedule is not None:
            candidates.append(judge(graph, reordering.schedule_of_original(inner.schedule)))
        if inner.interrupted:
            return verdict.conclude(candidates, interrupted=True, trace=tuple(trace))
        return verdict.conclude(candidates, hit_limit=True, message=_claim(inner, walked), trace=tuple(trace))

    def _order_search(self) -> OrderSearch:
        seconds = min(10.0, self.time_limit_seconds / 4)
        if self.work_limit is None:
            return OrderSearch(time_limit_seconds=seconds, seed=self.seed)
        moves = self.work_limit * MOVES_PER_UNIT // 4
        return OrderSearch(moves=moves, moves_per_operator=0, time_limit_seconds=seconds, seed=self.seed)

    def _inner(self, began: float) -> Solver:
        kind: Any = solver_class(self.solver)
        left = self.time_limit_seconds - (time.monotonic() - began)
        options = {
            "time_limit_seconds": max(0.0, left),
            "gap": self.gap,
            "seed": self.seed,
            "work_limit": self.work_limit,
        }
        fields = {field.name for field in dataclasses.fields(kind)}
        return kind(**{name: value for name, value in options.items() if name in fields})

    def _walk(
        self, graph: Graph, budget_bytes: int, candidates: list[Candidate], began: float, hints: Hints
    ) -> Solution:
        moves = None if self.work_limit is None else self.work_limit * MOVES_PER_UNIT
        left = self.time_limit_seconds - (time.monotonic() - began)
        search = LocalSearch(time_limit_seconds=max(0.0, left / 2), move_limit=moves, seed=self.seed)
        known = tuple(c.schedule for c in candidates)
        return search.solve(graph, budget_bytes, Hints(schedules=known, progress=hints.progress))


def _claim(inner: Solution, walked: Solution) -> str:
    """Who found what, and what was proven of one order, in words."""
    proven = f"for this order of first executions {inner.solver} proved a lower bound of {inner.lower_bound:.3%}"
    if inner.status is Status.INFEASIBLE:
        proven = f"for this order of first executions {inner.solver} proved that nothing fits"
    if math.isinf(min(inner.overhead, walked.overhead)):
        return f"nothing found; {proven}"
    return f"schedule by {inner.solver if inner.overhead < walked.overhead else walked.solver}; {proven}"
