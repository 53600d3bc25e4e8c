"""The page of one plan: figures, ledger, pictures, decisions by module, the peak, and the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from graph_capture.formats import format_bytes, format_fraction, format_seconds
from planner.page.render import Figure, render
from planner.page.tables import POINTS_HEAD, Table, point_cells, size_cell
from planner.pictures.blocks import blocks_of
from planner.pictures.graph import graph_svg
from planner.pictures.of_plan import curve_of_plan, memory_of_plan, title_of
from planner.plan_file import Plan
from planner.plan_table import plan_rows
from planner.report import Ledger, ModuleRow, PeakReport, report_on
from planner.report.modules import total_row

_CARDS = frozenset({"model", "budget", "overhead", "lower bound", "gap", "  covers", ""})
"""Rows of the plan's table that the page shows in another form."""


def plan_page(plan: Plan, *, biggest: int = 15) -> str:
    """The page as text; `biggest` rows of what is in memory at the peak are shown."""
    graph, schedule = plan.to_graph(), plan.to_schedule()
    report = report_on(plan)
    curve = curve_of_plan(plan)
    shown = [row for row in report.modules if row.kept_bytes or row.released_bytes or row.recomputed_operators]
    quiet = len(report.modules) - len(shown)
    return render(
        "plan.html.jinja",
        heading=title_of(plan),
        subtitle=f"{plan.model.class_name}, planned for {plan.environment.device} by {plan.solver}",
        cards=_cards(plan),
        meanings=[(label, f"{said[0].upper()}{said[1:]}.") for label, said in report.meanings.items()],
        memory=Figure.of(memory_of_plan(plan).svg),
        **_ledger(report.ledger),
        **_modules(shown, report.modules),
        quiet=f"{quiet} more of the rows keep and recompute nothing." if quiet else "",
        **_peak(report.peak, biggest),
        curve=Figure.of(curve.svg),
        points_head=POINTS_HEAD,
        points=[point_cells(point) for point in curve.points],
        graph=Markup(graph_svg(blocks_of(graph, schedule))),
        facts=[(label.strip(), said) for label, said in plan_rows(plan) if label not in _CARDS],
    )


def _cards(plan: Plan) -> list[tuple[str, str, str]]:
    peak, budget, before = plan.predicted_peak_bytes, plan.budget_bytes, plan.store_all_peak_bytes
    saved = format_bytes(max(0, before - peak), short=True)
    step = plan.simulation().recomputed_seconds
    return [
        ("budget", format_bytes(budget, short=True), f"asked for: {plan.budget.requested}"),
        ("peak", format_bytes(peak, short=True), f"{saved} less than store-all"),
        ("overhead", format_fraction(plan.overhead), f"{format_seconds(step)} a step" if step else "nothing again"),
        ("lower bound", format_fraction(plan.lower_bound), "proven" if plan.lower_bound else "nothing is proven"),
        ("gap", format_fraction(plan.gap), plan.status.lower()),
    ]


def _ledger(ledger: Ledger) -> dict[str, Any]:
    rows: Table = [(row.label, size_cell(row.before_bytes), size_cell(row.after_bytes)) for row in ledger.rows]
    over = ledger.before_bytes - ledger.budget_bytes
    left = format_bytes(abs(over), short=True)
    rows.append(("left of the budget", f"{left} too much" if over > 0 else left, size_cell(ledger.unused_bytes)))
    rows.append(("peak", size_cell(ledger.before_bytes), size_cell(ledger.after_bytes)))
    return {"ledger_head": [("", "t"), ("store-all", "n"), ("this plan", "n")], "ledger": rows}


def _modules(shown: Sequence[ModuleRow], everything: Sequence[ModuleRow]) -> dict[str, Any]:
    names = ("modules", "operators", "recomputed", "kept", "released", "time again")
    head = [("module", "t"), *((name, "n") for name in names), ("why", "t"), ("", "w")]
    largest = max((row.kept_bytes + row.released_bytes for row in shown), default=0)
    rows = [(*_module_cells(row), row.reason, _bar(row, largest)) for row in shown]
    return {"modules_head": head, "modules": [*rows, (*_module_cells(total_row(everything)), "", "")]}


def _module_cells(row: ModuleRow) -> tuple[str, ...]:
    again = format_seconds(row.recomputed_seconds) if row.recomputed_seconds else "0"
    counts = str(row.modules), str(row.operators), str(row.recomputed_operators)
    return (row.label, *counts, size_cell(row.kept_bytes), size_cell(row.released_bytes), again)


def _bar(row: ModuleRow, largest: int) -> Markup:
    """What is kept and what is released of a row, as a bar; the biggest row fills it."""
    widths = [("kept", row.kept_bytes), ("again", row.released_bytes)]
    pieces = "".join(
        f'<i style="width:{100 * size / largest:.1f}%;background:var(--{name})"></i>'
        for name, size in widths
        if largest
    )
    return Markup(f'<div class="bar">{pieces}</div>')


def _peak(peak: PeakReport | None, biggest: int) -> dict[str, Any]:
    head = [("tensor", "t"), ("made by", "w"), ("type", "t"), ("x", "n"), ("bytes", "n")]
    if peak is None:
        return {"peak": "", "alive_head": head, "alive": [], "rest": ""}
    place = ", ".join(part for part in (peak.module, peak.source) if part)
    again = ", a recomputation" if peak.again else ""
    said = (
        f"{format_bytes(peak.peak_bytes)}, {format_seconds(peak.seconds)} into the step, while {peak.operator} runs "
        f"({peak.phase}{again}{f'; {place}' if place else ''}), in a {peak.regime} micro-batch."
    )
    rows = [
        (
            row.label,
            " at ".join(p for p in (row.target, row.source) if p),
            row.tensor,
            str(row.values),
            size_cell(row.size_bytes),
        )
        for row in peak.alive[:biggest]
    ]
    others = peak.alive[biggest:]
    count, size = sum(row.values for row in others), sum(row.size_bytes for row in others)
    rest = f"And {count} smaller ones, {format_bytes(size, short=True)}." if others else ""
    return {"peak": said, "alive_head": head, "alive": rows, "rest": rest}
