"""The points of a trade-off curve, and their table; without torch, so that the command line can show a plan's curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graph_capture.formats import format_bytes, format_fraction, format_seconds
from solvers.solution import Solution


@dataclass(frozen=True)
class ParetoPoint:
    """One budget of the curve.

    **Fields:**

    - `requested`: the budget as it was written. `budget_bytes`: what it comes to.
    - `solution`: schedule, bound, status and seconds of its solve.
    """

    requested: str
    budget_bytes: int
    solution: Solution

    @property
    def overhead(self) -> float:
        """Seconds of recomputation as a fraction of the store-all step; `inf` where nothing was found."""
        return self.solution.overhead

    @property
    def lower_bound(self) -> float:
        """No schedule of the bound's scope has less overhead; `inf` where it is proven that none fits."""
        return self.solution.lower_bound

    @property
    def gap(self) -> float:
        """Overhead minus lower bound."""
        return self.solution.gap

    @property
    def predicted_peak_bytes(self) -> int:
        """The simulator's peak of the schedule; 0 without one."""
        return self.solution.predicted_peak_bytes

    @property
    def status(self) -> str:
        """`OPTIMAL`, `FEASIBLE`, `INFEASIBLE` or `UNKNOWN`."""
        return self.solution.status.name

    @property
    def seconds(self) -> float:
        """Time that this budget's solve took."""
        return self.solution.seconds


def points_text(points: Sequence[ParetoPoint]) -> str:
    """The table of budgets."""
    from planner.report.text import columns

    head = ("budget", "", "peak", "overhead", "lower bound", "gap", "status", "seconds")
    return columns([head, *map(_cells, points)])


def _cells(point: ParetoPoint) -> tuple[str, ...]:
    solution, size = point.solution, format_bytes(point.budget_bytes, short=True)
    seconds = format_seconds(solution.seconds)
    if solution.schedule is None:
        bound = "" if math.isinf(solution.lower_bound) else format_fraction(solution.lower_bound)
        return point.requested, size, "-", "-", bound, "", solution.status.name.lower(), seconds
    figures = (format_fraction(f) for f in (solution.overhead, solution.lower_bound, solution.gap))
    peak = format_bytes(solution.predicted_peak_bytes, short=True)
    return (point.requested, size, peak, *figures, solution.status.name.lower(), seconds)
