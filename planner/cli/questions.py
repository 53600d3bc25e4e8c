"""The verbs `minimum-budget` and `max-batch`: what is the least that works, and the most that fits."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from planner.cli.paths import check_output
from planner.cli.planning import is_plan, planning_arguments
from planner.cli.progress import CAPTURING, progress_on

if TYPE_CHECKING:
    from planner.max_batch_size import MaxBatchSize
    from solvers.minimum_budget import MinimumBudget


def solve_minimum(options: argparse.Namespace) -> MinimumBudget:
    """The smallest budget of a model, or of a plan's graph."""
    of_plan, arguments = is_plan(options), planning_arguments(options, default_seconds=60.0)
    if of_plan:
        from planner.plan_file import Plan
        from planner.warm_start import schedules_of_start
        from solvers.minimum_budget import minimum_budget as smallest_peak

        graph, limit = Plan.load(options.target).to_graph(), arguments["time_limit_seconds"]
        start = schedules_of_start(graph, arguments["start"])
        with progress_on(sys.stderr) as listener:
            return smallest_peak(graph, arguments["solver"], time_limit_seconds=limit, start=start, progress=listener)
    from planner.cli.factory import make
    from planner.minimum_budget import minimum_budget

    made = make(options.target)
    with progress_on(sys.stderr, CAPTURING) as listener:
        return minimum_budget(made.model, made.args, made.kwargs, loss_fn=made.loss_fn, **arguments, progress=listener)


def minimum_data(found: MinimumBudget) -> dict[str, Any]:
    """The answer for JSON; the schedule is left out."""
    names = [field.name for field in dataclasses.fields(found) if field.name != "schedule"]
    return {**{name: getattr(found, name) for name in names}, "gap": found.gap}


def solve_batch(options: argparse.Namespace) -> MaxBatchSize:
    """The largest batch of a model whose factory returns `(model, make_inputs)`."""
    check_output(options.output, "the plan")
    from planner.cli.factory import make_for_batches
    from planner.max_batch_size import LIMIT, SECONDS_PER_BATCH, max_batch_size

    arguments = planning_arguments(options, default_seconds=SECONDS_PER_BATCH)
    made = make_for_batches(options.target)
    with progress_on(sys.stderr, CAPTURING) as listener:
        return max_batch_size(
            made.model,
            options.budget,
            made.make_inputs,
            loss_fn=made.loss_fn,
            **arguments,
            max_overhead=None if options.max_overhead is None else options.max_overhead / 100,
            multiple_of=options.multiple_of,
            limit=LIMIT if options.limit is None else options.limit,
            prefer=options.prefer,
            progress=listener,
        )


def batch_data(found: MaxBatchSize) -> dict[str, Any]:
    """The answer for JSON; the plan is a file of its own."""
    return {
        "batch": found.batch,
        "budget_bytes": found.budget_bytes,
        "overhead": found.plan.overhead,
        "predicted_peak_bytes": found.plan.predicted_peak_bytes,
        "store_all_batch": found.store_all_batch,
        "fastest_batch": found.fastest.batch,
        "proven": found.proven,
        "limit_reached": found.limit_reached,
        "interrupted": found.interrupted,
        "trials": [dataclasses.asdict(trial) for trial in found.trials],
    }
