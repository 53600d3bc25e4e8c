"""One sentence each for overhead, lower bound and gap: what the figure beside it means for whoever trains the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graph_capture.formats import format_seconds

if TYPE_CHECKING:
    from planner.plan_file import Plan


def meanings(plan: Plan) -> dict[str, str]:
    """The sentences by the name of the figure, in the order in which they are read."""
    return {"overhead": _overhead(plan), "lower bound": _bound(plan), "gap": _gap(plan)}


def _overhead(plan: Plan) -> str:
    seconds = plan.simulation().recomputed_seconds
    if not seconds:
        return "a step takes as long as without a plan"
    step = f"{format_seconds(plan.step_seconds)}, as priced for {plan.environment.device}"
    return f"a step takes {format_seconds(seconds)} longer than without checkpointing ({step})"


def _bound(plan: Plan) -> str:
    if not plan.overhead:
        return "no schedule costs less than nothing"
    if not plan.lower_bound:
        return f"{plan.solver} proves nothing about what the best schedule would cost"
    return f"nothing within the budget costs less, proven for {plan.bound_scope or 'no class of schedules'}"


def _gap(plan: Plan) -> str:
    if not plan.overhead:
        return "there is no better plan"
    if not plan.gap:
        return "there is no better plan among the schedules that the bound speaks of"
    if not plan.lower_bound:
        return "nothing is known of how much of it a perfect schedule would save"
    return f"a perfect schedule of those would save at most {format_seconds(plan.gap * plan.step_seconds)} a step"
