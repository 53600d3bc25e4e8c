"""A warm start: an earlier plan, or a schedule, that the search begins from."""

from __future__ import annotations

from graph_capture.graph import Graph
from planner.errors import InvalidPlanError
from planner.plan_file import Plan
from solvers.schedule import Schedule
from solvers.simulator import ScheduleError, simulate

Start = Plan | Schedule


def schedules_of_start(graph: Graph, start: Start | None) -> tuple[Schedule, ...]:
    """The schedules to start from; none if there is no `start`.

    What counts is that the schedule is legal on `graph`: a plan of another batch size may start this one.

    Raises :class:`~planner.errors.InvalidPlanError` if it is not, or if `start` is something else.
    """
    if start is None:
        return ()
    if not isinstance(start, (Plan, Schedule)):  # a caller without types
        raise InvalidPlanError(
            f"`start` is {start!r}, neither a Plan nor a Schedule; read a plan file with Plan.load(path)"
        )
    schedule = start.to_schedule() if isinstance(start, Plan) else start
    try:
        simulate(graph, schedule)
    except ScheduleError as error:
        made_for = f", but a plan for {start.model.class_name}" if isinstance(start, Plan) else ""
        raise InvalidPlanError(
            f"`start` is no schedule of this training step{made_for} ({error}); make it for the same model, inputs, "
            "loss, compiler and pins, or leave it out"
        ) from error
    return (schedule,)
