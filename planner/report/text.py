"""The report as text: tables that fit a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from graph_capture.formats import format_bytes, format_seconds
from planner.report import AliveRow, ModuleRow, PeakReport, PlanReport
from planner.report.comparison import Comparison, ModuleDifference
from planner.report.modules import total_row


def report_text(report: PlanReport, *, biggest: int = 12) -> str:
    """Decisions by module, and the `biggest` rows at the peak; ledger and figures stand in the plan's own text."""
    parts = [modules_text(report.modules)]
    if report.peak is not None:
        parts.append(peak_text(report.peak, biggest))
    return "\n\n".join(parts)


def comparison_text(comparison: Comparison) -> str:
    """Two plans side by side: the figures, and the modules that they decide differently."""
    figures = columns(
        [("", "a", "b", "b against a"), *((r.label, r.first, r.second, r.difference) for r in comparison.figures)],
        left=1,
    )
    parts = [figures, *(f"note: {note}" for note in comparison.notes)]
    if comparison.modules:
        head = ("module", *(f"{what} {side}" for what in ("kept", "released", "again") for side in "ab"))
        parts.append(columns([head, *map(_difference_cells, comparison.modules)], left=1))
    else:
        parts.append("both keep and recompute the same, module by module")
    return "\n\n".join(parts)


def modules_text(rows: Sequence[ModuleRow]) -> str:
    """The table of modules; those that neither keep nor recompute anything are counted in the last line."""
    shown = [row for row in rows if row.kept_bytes or row.released_bytes or row.recomputed_operators]
    header = ("module", "x", "operators", "recomputed", "kept", "released", "seconds again", "why")
    body = [(*_module_cells(row), row.reason) for row in shown]
    total = (*_module_cells(total_row(rows)), "")
    quiet = len(rows) - len(shown)
    note = f"\n{quiet} more {'row keeps and recomputes' if quiet == 1 else 'rows keep and recompute'} nothing"
    return columns([header, *body, total], left=1, ragged=True) + (note if quiet else "")


def peak_text(peak: PeakReport, biggest: int) -> str:
    """What runs at the peak, and the biggest values there."""
    place = ", ".join(part for part in (peak.module, peak.source) if part)
    again = ", a recomputation" if peak.again else ""
    micro_batch = "first" if peak.regime == "first" else "later"
    lines = [
        f"peak: {format_bytes(peak.peak_bytes)} in a {micro_batch} micro-batch, {format_seconds(peak.seconds)} into "
        f"the step, while {peak.operator} runs ({peak.phase}{again}{f'; {place}' if place else ''})",
        "",
        columns(
            [("in memory at the peak", "x", "bytes", "tensor", "made by"), *map(_alive_cells, peak.alive[:biggest])]
        ),
    ]
    rest = peak.alive[biggest:]
    if rest:
        size = format_bytes(sum(row.size_bytes for row in rest), short=True)
        lines.append(f"and {sum(row.values for row in rest)} smaller ones, {size}")
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]], *, left: int | None = None, ragged: bool = False) -> str:
    """Align cells in columns.

    **Arguments:**

    - `left`: how many columns are aligned to the left, the others to the right; all to the left if `None`.
    - `ragged`: the last column is text, to the left as well.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: list[str] = []
    for row in rows:
        cells = (
            cell.ljust(width)
            if left is None or column < left or (ragged and column == len(row) - 1)
            else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _size(size_bytes: int) -> str:
    return format_bytes(size_bytes, short=True)


def _module_cells(row: ModuleRow) -> tuple[str, ...]:
    return (
        row.label,
        str(row.modules),
        str(row.operators),
        str(row.recomputed_operators),
        _size(row.kept_bytes),
        _size(row.released_bytes),
        format_seconds(row.recomputed_seconds) if row.recomputed_seconds else "0",
    )


def _difference_cells(row: ModuleDifference) -> tuple[str, ...]:
    seconds = (format_seconds(s) if s else "0" for s in row.recomputed_seconds)
    return (row.label, *map(_size, (*row.kept_bytes, *row.released_bytes)), *seconds)


def _alive_cells(row: AliveRow) -> tuple[str, ...]:
    made_by = f"{row.target} at {row.source}" if row.source else row.target
    return row.label, str(row.values), _size(row.size_bytes), row.tensor, made_by
