"""What `print(max_batch_size(...))` shows: the answer, and the table of what was tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graph_capture.formats import format_bytes, format_fraction

if TYPE_CHECKING:
    from planner.max_batch_size import MaxBatchSize


def batch_text(found: MaxBatchSize) -> str:
    """The answer, and the table of what was tried."""
    from planner.report.text import columns

    head = ("batch", "outcome", "peak", "store-all's peak", "overhead", "samples/s", "seconds")
    rows = [
        (
            str(t.batch),
            t.outcome,
            "-" if t.peak_bytes is None else format_bytes(t.peak_bytes, short=True),
            format_bytes(t.store_all_peak_bytes, short=True),
            "-" if t.overhead is None else format_fraction(t.overhead),
            "-" if t.samples_per_second is None else f"{t.samples_per_second:.4g}",
            f"{t.seconds:.1f}",
        )
        for t in found.trials
    ]
    lines = [
        f"batch              {found.batch} within {format_bytes(found.budget_bytes)}; "
        f"the next larger one {_beyond(found)}",
        f"overhead           {format_fraction(found.plan.overhead)}",
        f"without a plan     {found.store_all_batch}",
        f"most samples/s     batch {found.fastest.batch}, by the cost model",
    ]
    return "\n".join([*lines, "", columns([head, *rows], left=2)])


def _beyond(found: MaxBatchSize) -> str:
    if found.interrupted:
        return "was not tried: interrupted"
    if found.limit_reached:
        return "was not allowed"
    return "is proven not to fit" if found.proven else "was not found to fit"
