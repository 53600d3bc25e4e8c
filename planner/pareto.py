"""``pareto(model, budgets)``: the whole trade-off curve of overhead against budget, from one capture.

Also called the Pareto front, or the memory-time trade-off. The model is captured once; each budget's solve uses the
bounds and schedules of the others (:mod:`solvers.pareto`), so that the curve is monotone and costs less than its parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graph_capture.capture import Capture
from graph_capture.costs import Costs
from graph_capture.devices import Device
from graph_capture.graph import Compiler, Graph
from planner.api import LossFn, capture_with_peak, plan_of
from planner.budget import Budget, parse_budget
from planner.by_partitioner import by_partitioner
from planner.curve_points import ParetoPoint, points_text
from planner.errors import error_for_solution
from planner.pictures.points import Point, point_of
from planner.pins import Patterns, Pins, pinned, pins_of
from planner.plan_file import Plan
from planner.warm_start import Start, schedules_of_start
from solvers.auto import chosen_solver
from solvers.hints import ProgressListener
from solvers.pareto import curve
from solvers.simulator import simulate_store_all
from solvers.solution import Solver


@dataclass(frozen=True)
class _Origin:
    """What a plan needs beside a solution."""

    module: torch.nn.Module
    captured: Capture
    solver: Solver
    capture_seconds: float
    costs: Costs
    pins: Pins


@dataclass(frozen=True)
class Pareto:
    """The trade-off curve; more budget never means more overhead.

    **Fields:**

    - `points`: one per budget, in ascending order.
    - `graph`: what was solved. `eager_peak_bytes`: 100 % of budgets in percent.
    - `store_all_peak_bytes`: the budget from which on nothing is recomputed.
    - `beside`: PyTorch's own memory budgets on the same graph, as asked for with `memory_budgets`.
    """

    points: tuple[ParetoPoint, ...]
    graph: Graph
    eager_peak_bytes: int
    store_all_peak_bytes: int
    beside: tuple[Point, ...] = ()
    _origin: _Origin | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return points_text(self.points)

    def plan(self, index: int) -> Plan:
        """The plan of point `index`, as :func:`planner.plan` would return it.

        Raises :class:`~planner.errors.InfeasibleBudgetError` where there is no schedule, and `ValueError` if the curve
        was made from a graph: a plan belongs to a model.
        """
        point, origin = self.points[index], self._origin
        if origin is None:
            raise ValueError("this curve was made from a graph; a plan belongs to a model: call pareto(model, ...)")
        if point.solution.schedule is None:
            raise error_for_solution(point.solution, self.graph, point.budget_bytes, self.eager_peak_bytes)
        return plan_of(
            origin.module,
            origin.captured,
            parse_budget(point.budget_bytes),
            point.budget_bytes,
            point.solution,
            origin.solver,
            origin.capture_seconds,
            origin.costs,
            origin.pins,
        )


def pareto(
    model: Any,
    budgets: Iterable[int | str | Budget],
    example_inputs: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    loss_fn: LossFn | None = None,
    solver: Solver | None = None,
    device: str | Device | None = None,
    time_limit_seconds: float | None = None,
    gradient_accumulation: bool = True,
    extra_bytes: Mapping[str, int] | None = None,
    costs: Costs = "roofline",
    compiler: Compiler = "eager",
    memory_budgets: Sequence[float] = (),
    keep: Patterns = (),
    recompute: Patterns = (),
    start: Start | None = None,
    progress: ProgressListener | None = None,
) -> Pareto:
    """The cheapest known schedule, and a lower bound, for each of several budgets.

    **Arguments:** as :func:`planner.plan`, but

    - `model`: a model, or a :class:`~graph_capture.graph.Graph` (then the arguments of the capture are not used, and a
      percentage refers to the store-all schedule's peak).
    - `budgets`: each as `plan` takes it. `time_limit_seconds` is for each of them.
    - `start`: every budget's solve starts from it. It must be of the same step, of whatever budget.
    - `memory_budgets`: values of PyTorch's `activation_memory_budget` (0 to 1) to show beside the curve: what its
      partitioner would save is asked for, and evaluated as a schedule of the same graph.

    Raises what `plan` raises, but for budgets that cannot be met: those are points whose status says so.
    """
    wanted = [parse_budget(budget) for budget in budgets]
    solver = chosen_solver(solver, time_limit_seconds)
    origin: _Origin | None = None
    pins = pins_of(keep, recompute)
    if isinstance(model, Graph):
        graph = pinned(model, pins)
        eager_peak_bytes = simulate_store_all(graph).peak_bytes
    else:
        module, captured, capture_seconds = capture_with_peak(
            model,
            example_inputs,
            example_kwargs,
            loss_fn=loss_fn,
            device=device,
            gradient_accumulation=gradient_accumulation,
            extra_bytes=extra_bytes,
            costs=costs,
            compiler=compiler,
            pins=pins,
            memory_budgets=memory_budgets,
        )
        assert captured.eager_peak_bytes is not None
        graph, eager_peak_bytes = captured.graph, captured.eager_peak_bytes
        origin = _Origin(module, captured, solver, capture_seconds, costs, pins)
    names = {budget.resolve(eager_peak_bytes): str(budget) for budget in wanted}
    solved = curve(graph, names, solver, progress, start=schedules_of_start(graph, start))
    points = tuple(ParetoPoint(names[point.budget_bytes], point.budget_bytes, point.solution) for point in solved)
    beside = _by_memory_budgets(origin.captured) if origin is not None else ()
    return Pareto(points, graph, eager_peak_bytes, simulate_store_all(graph).peak_bytes, beside, origin)


def _by_memory_budgets(captured: Capture) -> tuple[Point, ...]:
    """What PyTorch's partitioner would save at the memory budgets that were asked for, as schedules of the graph."""
    graph = captured.graph
    return tuple(
        point_of(f"memory budget {ratio:g}", "by hand", graph, by_partitioner(graph, saved))
        for ratio, saved in captured.saved_by_pytorch.items()
    )
