"""``minimum_budget(model)``: the smallest budget that works, with a lower bound beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graph_capture.costs import Costs
from graph_capture.devices import Device
from graph_capture.graph import Compiler, Graph
from planner.api import LossFn, capture_with_peak
from planner.pins import Patterns, pinned, pins_of
from planner.warm_start import Start, schedules_of_start
from solvers.hints import ProgressListener
from solvers.minimum_budget import MinimumBudget
from solvers.minimum_budget import minimum_budget as smallest_peak
from solvers.solution import Solver


def minimum_budget(
    model: Any,
    example_inputs: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    loss_fn: LossFn | None = None,
    solver: Solver | None = None,
    device: str | Device | None = None,
    time_limit_seconds: float = 60.0,
    gradient_accumulation: bool = True,
    extra_bytes: Mapping[str, int] | None = None,
    costs: Costs = "roofline",
    compiler: Compiler = "eager",
    keep: Patterns = (),
    recompute: Patterns = (),
    start: Start | None = None,
    progress: ProgressListener | None = None,
) -> MinimumBudget:
    """The smallest peak in bytes that any known schedule of a training step reaches, whatever it costs.

    **Arguments:** as :func:`planner.plan`; `model` may be a :class:`~graph_capture.graph.Graph` as well.
    `time_limit_seconds` is for the whole search, `solver` looks for schedules and proofs; the search goes down from
    `start`. Ctrl-C ends the search with what is known by then.

    **Returns:**

    `peak_bytes` is a budget that works: `plan` takes it, at once if it starts from `schedule`. Below
    `lower_bound_bytes` no schedule of `bound_scope` does.

    ```python
    smallest = minimum_budget(model, (ids,), {"labels": ids})
    p = plan(model, smallest.peak_bytes, (ids,), {"labels": ids}, start=smallest.schedule)
    ```
    """
    pins = pins_of(keep, recompute)
    if isinstance(model, Graph):
        graph = pinned(model, pins)
    else:
        _, captured, _ = capture_with_peak(
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
        )
        graph = captured.graph
    known = schedules_of_start(graph, start)
    return smallest_peak(graph, solver, time_limit_seconds=time_limit_seconds, start=known, progress=progress)
