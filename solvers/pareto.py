"""The trade-off curve: overhead against budget, the Pareto front, the memory-time trade-off.

One solve per budget, from the largest to the smallest, each with all that the ones before it have shown: a lower bound
holds for every smaller budget, a proof of infeasibility too, and a schedule that was met on the way is a candidate
wherever it fits. At the end every schedule is offered to every budget that it fits. So the curve is monotone, whatever
limits the solves ran into: more budget never means more overhead, less budget never a smaller bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from graph_capture.graph import Graph
from solvers.hints import Hints, Progress, ProgressListener
from solvers.schedule import Schedule
from solvers.snapshot.search import OPTIMALITY_TOLERANCE
from solvers.solution import SearchClass, Solution, Solver, Status

_ORDERED = (SearchClass.ORDERED, SearchClass.MIXED)
"""Classes whose bounds speak of every schedule of the ordered class."""


@dataclass(frozen=True)
class CurvePoint:
    """One budget of a curve and its solution."""

    budget_bytes: int
    solution: Solution


def curve(
    graph: Graph,
    budgets_bytes: Iterable[int],
    solver: Solver,
    progress: ProgressListener | None = None,
    *,
    start: tuple[Schedule, ...] = (),
) -> tuple[CurvePoint, ...]:
    """The solutions of all budgets, in ascending order of the budgets; after Ctrl-C, of those solved so far.

    **Arguments:**

    - `budgets_bytes`: in any order; repeated ones are solved once.
    - `solver`: of each budget; its limits count for each one by itself.
    - `start`: schedules that are known already; every solve gets them.
    """
    solved: list[CurvePoint] = []
    lower_bound = 0.0
    budgets_bytes = sorted(set(budgets_bytes), reverse=True)
    for number, budget_bytes in enumerate(budgets_bytes):
        if solved and solved[-1].solution.status is Status.INFEASIBLE:
            solution = dataclasses.replace(solved[-1].solution, seconds=0.0, trace=())
        else:
            schedules = tuple(p.solution.schedule for p in solved[-2:] if p.solution.schedule is not None)
            listener = _of_all(progress, number, len(budgets_bytes))
            hints = Hints(schedules=(*schedules, *start), lower_bound=lower_bound, progress=listener)
            hints.starting(solver)
            try:
                solution = solver.solve(graph, budget_bytes, hints)
            except KeyboardInterrupt:
                if not solved:
                    raise
                break
            if solution.search_class in _ORDERED and math.isfinite(solution.lower_bound):
                lower_bound = max(lower_bound, solution.lower_bound)
        solved.append(CurvePoint(budget_bytes, solution))
        if solution.interrupted:
            break
    return tuple(_shared(solved[::-1]))


def _of_all(progress: ProgressListener | None, number: int, budgets: int) -> ProgressListener | None:
    """Tells `progress` which budget it is, and when all of them will be solved at the latest."""
    if progress is None:
        return None

    def tell(event: Progress) -> None:
        limit = event.time_limit_seconds
        limit = None if limit is None else limit * (budgets - number)
        stage = f"budget {number + 1} of {budgets}, {event.stage}"
        progress(dataclasses.replace(event, stage=stage, time_limit_seconds=limit))

    return tell


def _shared(points: Sequence[CurvePoint]) -> Iterator[CurvePoint]:
    """Give each budget, from the smallest on, the cheapest schedule of those that fit it."""
    best: Solution | None = None
    for point in points:
        solution = point.solution
        if best is not None and best.overhead < solution.overhead:
            solution = _with_schedule_of(solution, best)
        if solution.schedule is not None:
            best = solution
        yield CurvePoint(point.budget_bytes, solution)


def _with_schedule_of(solution: Solution, better: Solution) -> Solution:
    """`solution`, a larger budget's, with the schedule of a smaller one, which fits there as well."""
    if solution.status is Status.INFEASIBLE:
        raise AssertionError("a schedule fits a budget that was proven infeasible; please report this graph")
    lower_bound = min(solution.lower_bound, better.overhead)
    closed = better.overhead - lower_bound <= OPTIMALITY_TOLERANCE
    return dataclasses.replace(
        solution,
        status=Status.OPTIMAL if closed else Status.FEASIBLE,
        schedule=better.schedule,
        overhead=better.overhead,
        lower_bound=lower_bound,
        predicted_peak_bytes=better.predicted_peak_bytes,
        schedule_by=f"{better.schedule_by or better.solver} at a smaller budget",
        message="",
    )
