"""The report as text: two tables that fit a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from planner.budget import format_bytes
from planner.plan_table import format_seconds
from planner.report import AliveRow, ModuleRow, PeakReport, PlanReport


def report_text(report: PlanReport, *, biggest: int = 12) -> str:
    """The report as text, with the `biggest` rows of what is in memory at the peak."""
    return "\n\n".join((modules_text(report.modules), peak_text(report.peak, biggest)))


def modules_text(rows: Sequence[ModuleRow]) -> str:
    """The table of modules; those that neither keep nor recompute anything are counted in the last line."""
    shown = [row for row in rows if row.kept_bytes or row.released_bytes or row.recomputed_operators]
    header = ("module", "x", "operators", "recomputed", "kept", "released", "seconds again")
    body = [_module_cells(row) for row in shown]
    total = _module_cells(
        ModuleRow(
            label="total",
            modules=sum(row.modules for row in rows),
            operators=sum(row.operators for row in rows),
            recomputed_operators=sum(row.recomputed_operators for row in rows),
            kept_bytes=sum(row.kept_bytes for row in rows),
            released_bytes=sum(row.released_bytes for row in rows),
            recomputed_seconds=sum(row.recomputed_seconds for row in rows),
        )
    )
    quiet = len(rows) - len(shown)
    note = f"\n{quiet} more rows keep and recompute nothing" if quiet else ""
    return columns([header, *body, total], left=1) + note


def peak_text(peak: PeakReport, biggest: int) -> str:
    """What runs at the peak, what the peak consists of, and the biggest values there."""
    place = ", ".join(part for part in (peak.module, peak.source) if part)
    again = ", a recomputation" if peak.again else ""
    micro_batch = "first" if peak.regime == "first" else "later"
    lines = [
        f"peak: {format_bytes(peak.peak_bytes)} in a {micro_batch} micro-batch, while {peak.operator} runs "
        f"({peak.phase}{again}{f'; {place}' if place else ''})",
        *(f"  {format_bytes(size, short=True):>12}  {label}" for label, size in peak.lines),
        "",
    ]
    rest = peak.alive[biggest:]
    table = columns(
        [("in memory at the peak", "x", "bytes", "tensor", "made by"), *map(_alive_cells, peak.alive[:biggest])]
    )
    lines.append(table)
    if rest:
        size = format_bytes(sum(row.size_bytes for row in rest), short=True)
        lines.append(f"and {sum(row.values for row in rest)} smaller ones, {size}")
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]], *, left: int | None = None) -> str:
    """Align cells in columns: the first `left` ones to the left, the others to the right; all to the left if `None`."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: list[str] = []
    for row in rows:
        cells = (
            cell.ljust(width) if left is None or column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _module_cells(row: ModuleRow) -> tuple[str, ...]:
    return (
        row.label,
        str(row.modules),
        str(row.operators),
        str(row.recomputed_operators),
        format_bytes(row.kept_bytes, short=True),
        format_bytes(row.released_bytes, short=True),
        format_seconds(row.recomputed_seconds) if row.recomputed_seconds else "0",
    )


def _alive_cells(row: AliveRow) -> tuple[str, ...]:
    tensor = f"{row.dtype}[{', '.join(map(str, row.shape))}]" if row.dtype else row.kind
    made_by = f"{row.target} at {row.source}" if row.source else row.target
    return row.label, str(row.values), format_bytes(row.size_bytes, short=True), tensor, made_by
