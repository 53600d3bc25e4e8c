"""The solver for those who do not want to choose one.

What it does, in this order:

1. the store-all schedule, if it fits: nothing is recomputed, and no schedule is better;
2. :class:`~solvers.snapshot.SnapshotRefinement`: near-optimal schedules and the lower bound;
3. where that did not close the gap, and the graph has segments, :class:`~solvers.chen.ChenGreedy`: about a second for
   thousands of operators. It may fit where the refinement found nothing, or tell which budget would work.

The cheapest schedule that the simulator accepts wins; the message says whose it is and whose the bound is. Ask
:meth:`Auto.select` what it would rely on, and why.

*Search class*: the union of these. *Bound*: the one of snapshot refinement, a relaxation of the ordered class, which
contains the schedules of all three. A larger budget admits every schedule of a smaller one, yet a search that runs
into a limit may end worse; nothing is remembered from one solve to the next.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graph_capture.graph import Graph
from solvers.chen import ChenGreedy
from solvers.hints import NO_HINTS, Hints
from solvers.schedule import Schedule
from solvers.solution import SearchClass, Solution, Solver, Status, memory_floor, overhead_of
from solvers.store_all import StoreAll


@dataclass(frozen=True)
class Auto(Solver):
    """Store-all where it fits, else snapshot refinement, with Chen's segments as a safety net.

    **Fields:** handed on to :class:`~solvers.snapshot.SnapshotRefinement`.

    - `time_limit_seconds`: wall-clock limit of the refinement.
    - `gap`: stop when overhead and bound are this close, as a fraction of the store-all step.
    - `seed`: of everything random.
    - `work_limit`: deterministic work instead of time; the result is then the same on every machine.
    """

    time_limit_seconds: float = 30.0
    gap: float = 1e-3
    seed: int = 0
    work_limit: int | None = None
    name: ClassVar[str] = "auto"

    def select(self, graph: Graph, budget_bytes: int) -> tuple[Solver, str]:
        """The solver that decides for this graph and budget, and the reason for it."""
        _, peak_bytes = overhead_of(graph, Schedule.store_all(graph))
        if peak_bytes <= budget_bytes:
            return StoreAll(), f"the store-all schedule needs {peak_bytes:,} bytes and fits: nothing to recompute"
        floor_bytes, operator = memory_floor(graph)
        if budget_bytes < floor_bytes:
            at = f"operator {graph.operators[operator].name}" if len(graph) else "what is resident"
            return StoreAll(), f"nothing can fit: {at} alone needs {floor_bytes:,} bytes"
        reason = f"the store-all schedule needs {peak_bytes:,} bytes: something must be recomputed"
        return self._refinement(), reason

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """The cheapest schedule that any of the solvers finds, with the best bound."""
        started = time.perf_counter()
        solver, reason = self.select(graph, budget_bytes)
        solutions = [solver.solve(graph, budget_bytes)]
        segments = ChenGreedy()
        if solutions[0].gap > self.gap and segments.applies_to(graph) is None:
            solutions.append(segments.solve(graph, budget_bytes))
        return self._combine(solutions, reason, time.perf_counter() - started)

    def _refinement(self) -> Solver:
        from solvers.snapshot import SnapshotRefinement  # late: it brings compiled code with it

        return SnapshotRefinement(
            time_limit_seconds=self.time_limit_seconds, gap=self.gap, seed=self.seed, work_limit=self.work_limit
        )

    def _combine(self, solutions: Sequence[Solution], reason: str, seconds: float) -> Solution:
        """The best of several: `solutions[0]` is the one whose bound counts."""
        bounding = solutions[0]
        best = min(solutions, key=lambda s: (s.overhead, s.predicted_peak_bytes))
        known = [s.smallest_known_budget_bytes for s in solutions if s.smallest_known_budget_bytes is not None]
        status = bounding.status
        if best.schedule is not None and bounding.schedule is None:
            status = Status.FEASIBLE
        parts = [reason, f"schedule by {best.solver}, bound by {bounding.solver}"] if best.schedule else []
        parts += [bounding.message] if bounding.message and bounding.message not in parts else []
        return dataclasses.replace(
            best,
            solver=self.name,
            status=status,
            lower_bound=min(bounding.lower_bound, best.overhead),
            search_class=SearchClass.MIXED,
            bound_scope=bounding.bound_scope,
            seconds=seconds,
            hit_limit=bounding.hit_limit,
            message="; ".join(parts),
            smallest_known_budget_bytes=min(known, default=None),
            floor_operator=bounding.floor_operator,
            trace=tuple(f"{s.solver}: {line}" for s in solutions for line in _lines(s)),
        )


def _lines(solution: Solution) -> tuple[str, ...]:
    outcome = solution.status.name.lower()
    if solution.schedule is not None:
        outcome += f", overhead {solution.overhead:.4%}, peak {solution.predicted_peak_bytes:,} bytes"
    return (*solution.trace, f"{outcome}, {solution.seconds:.2f} s")
