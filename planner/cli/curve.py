"""The verb `pareto`: overhead against budget, of a model or of the graph that a plan was made on."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graph_capture.formats import format_bytes, format_fraction
from planner.budget import Budget, parse_budget
from planner.cli.planning import is_plan, planning_arguments
from planner.cli.progress import CAPTURING, progress_on
from planner.curve_points import ParetoPoint, points_text

if TYPE_CHECKING:
    from graph_capture.graph import Graph
    from planner.pictures.points import Point


@dataclass(frozen=True)
class Curve:
    """A curve, and what it is of."""

    name: str
    graph: Graph
    eager_peak_bytes: int
    rows: Sequence[ParetoPoint]
    beside: Sequence[Point] = ()

    def points(self) -> list[Point]:
        """The budgets that a schedule was found for."""
        from planner.pictures.points import Point

        return [
            Point(
                f"within {row.requested}",
                "plan",
                row.budget_bytes,
                row.solution.predicted_peak_bytes,
                row.solution.overhead,
                row.solution.lower_bound,
            )
            for row in self.rows
            if row.solution.schedule is not None
        ]

    @cached_property
    def references(self) -> list[Point]:
        """What else could be done with the graph; PyTorch's memory budget only where the model is at hand."""
        from planner.pictures.points import reference_points

        return [*reference_points(self.graph, [row.budget_bytes for row in self.rows]), *self.beside]


def solve_curve(options: argparse.Namespace) -> Curve:
    """Solve every budget of the command line, for a plan's graph or for a model."""
    budgets = [parse_budget(budget) for budget in options.budgets]
    of_plan, arguments = is_plan(options), planning_arguments(options)
    if of_plan:
        return _of_plan(options.target, budgets, arguments)
    from planner.by_partitioner import RATIOS
    from planner.cli.factory import make
    from planner.pareto import pareto

    made = make(options.target)
    with progress_on(sys.stderr, CAPTURING) as listener:
        found = pareto(
            made.model,
            budgets,
            made.args,
            made.kwargs,
            loss_fn=made.loss_fn,
            **arguments,
            memory_budgets=RATIOS,
            progress=listener,
        )
    return Curve(type(made.model).__name__, found.graph, found.eager_peak_bytes, found.points, found.beside)


def _of_plan(path: str, budgets: Sequence[Budget], arguments: Mapping[str, Any]) -> Curve:
    """Without the model and without torch: percentages are of the eager peak that the plan states."""
    from planner.plan_file import Plan
    from planner.warm_start import schedules_of_start
    from solvers.auto import chosen_solver
    from solvers.pareto import curve

    plan = Plan.load(path)
    graph, start = plan.to_graph(), schedules_of_start(plan.to_graph(), arguments["start"])
    solver = chosen_solver(arguments["solver"], arguments["time_limit_seconds"])
    written = {budget.resolve(plan.eager_peak_bytes): str(budget) for budget in budgets}
    with progress_on(sys.stderr) as listener:
        points = curve(graph, written, solver, listener, start=start)
    rows = [ParetoPoint(written[point.budget_bytes], point.budget_bytes, point.solution) for point in points]
    return Curve(plan.model.class_name.rsplit(".", 1)[-1], graph, plan.eager_peak_bytes, rows)


def curve_text(curve: Curve) -> str:
    """The table of budgets, and below it what else could be done."""
    from planner.report.text import columns

    others = [
        (point.label, format_bytes(point.peak_bytes, short=True), format_fraction(point.overhead))
        for point in curve.references
    ]
    beside = columns([("beside it", "peak", "overhead"), *others], left=1)
    return f"{curve.name}: eager's peak {format_bytes(curve.eager_peak_bytes)}\n\n{points_text(curve.rows)}\n\n{beside}"


def curve_data(curve: Curve) -> dict[str, Any]:
    """The curve for JSON: what is infinite is `null`."""
    points = [
        {
            "requested": row.requested,
            "budget_bytes": row.budget_bytes,
            "predicted_peak_bytes": row.solution.predicted_peak_bytes or None,
            "overhead": _finite(row.solution.overhead),
            "lower_bound": _finite(row.solution.lower_bound),
            "gap": _finite(row.solution.gap),
            "status": row.solution.status.name,
            "seconds": row.solution.seconds,
            "bound_scope": row.solution.bound_scope,
            "message": row.solution.message,
        }
        for row in curve.rows
    ]
    others = [
        {"label": point.label, "predicted_peak_bytes": point.peak_bytes, "overhead": point.overhead}
        for point in curve.references
    ]
    return {"model": curve.name, "eager_peak_bytes": curve.eager_peak_bytes, "points": points, "others": others}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
