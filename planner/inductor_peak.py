"""What a plan needs where Inductor compiles its programs, which takes no in-place forms."""

from __future__ import annotations

import warnings

from planner.budget import format_bytes
from planner.export.blocks import without_reuse
from planner.plan_file import Plan
from solvers.simulator import simulate


class InductorPeakWarning(UserWarning):
    """Compiled by Inductor a plan may need more than its budget: it counts on in-place forms, and there are none."""


def peak_without_in_place_bytes(plan: Plan) -> int:
    """The plan's peak in bytes with an allocation of its own for every result."""
    return simulate(plan.to_graph(), without_reuse(plan.to_schedule())).peak_bytes


def warn_if_over(plan: Plan, stacklevel: int = 3) -> None:
    """Issue :class:`InductorPeakWarning` if the plan fits its budget by in-place forms alone."""
    peak_bytes = peak_without_in_place_bytes(plan)
    if peak_bytes > plan.budget_bytes:
        warnings.warn(
            InductorPeakWarning(
                f"compiled by Inductor this plan may need {format_bytes(peak_bytes)}, more than its budget of "
                f"{format_bytes(plan.budget_bytes)}: it counts on operators that write into a dying input, which "
                f"Inductor does not run. Plan with extra_bytes={{'Inductor': {peak_bytes - plan.budget_bytes}}} or "
                "more, or run it with compiler='eager'."
            ),
            stacklevel=stacklevel,
        )
