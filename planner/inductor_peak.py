"""A plan and the kernels that run it: one made for eager kernels may be compiled by Inductor, not the other way."""

from __future__ import annotations

import warnings

from graph_capture.formats import format_bytes
from graph_capture.graph import Compiler
from planner.errors import PlanMismatchError
from planner.export.blocks import without_reuse
from planner.plan_file import Plan
from solvers.simulator import simulate


class InductorPeakWarning(UserWarning):
    """Compiled by Inductor a plan may need more than its budget: it counts on in-place forms, and there are none."""


def peak_without_in_place_bytes(plan: Plan) -> int:
    """The plan's peak in bytes with an allocation of its own for every result."""
    return simulate(plan.to_graph(), without_reuse(plan.to_schedule())).peak_bytes


def check_kernels(plan: Plan, compiler: Compiler) -> None:
    """Raise :class:`PlanMismatchError` if the plan counts on fused kernels and would be run without them."""
    if plan.compiler == "inductor" and compiler != "inductor":
        raise PlanMismatchError(
            f"the plan was made for Inductor's kernels and is to run with compiler={compiler!r}: what they fuse would "
            "be in memory, and no line of the plan counts it. Leave `compiler` out here, or in plan(...)."
        )


def warn_if_over(plan: Plan, stacklevel: int = 3) -> None:
    """Issue :class:`InductorPeakWarning` if the plan fits its budget by in-place forms alone."""
    peak_bytes = peak_without_in_place_bytes(plan)
    if peak_bytes > plan.budget_bytes:
        warnings.warn(
            InductorPeakWarning(
                f"compiled by Inductor this plan may need {format_bytes(peak_bytes)}, more than its budget of "
                f"{format_bytes(plan.budget_bytes)}: it counts on operators that write into a dying input, which "
                "Inductor does not run. Plan with plan(..., compiler='inductor'), or run it with compiler='eager'."
            ),
            stacklevel=stacklevel,
        )
