"""The page of two plans: their figures, both memory curves, the trade-off, and where they decide differently."""

from __future__ import annotations

from graph_capture.formats import format_bytes, format_fraction, format_seconds
from planner.page.render import Figure, render
from planner.page.tables import size_cell
from planner.pictures.of_plan import curve_of_two, memory_of_two
from planner.plan_file import Plan
from planner.report.comparison import ModuleDifference, compare


def comparison_page(first: Plan, second: Plan, names: tuple[str, str]) -> str:
    """The page as text; `names` are what the plans are called, such as their files' names."""
    comparison = compare(first, second)
    sides = [
        f"{name}, within {format_bytes(plan.budget_bytes, short=True)}, overhead {format_fraction(plan.overhead)}"
        for name, plan in zip(names, (first, second), strict=True)
    ]
    head = [("", "t"), ("a", "n"), ("b", "n"), ("b against a", "n")]
    modules_head = [
        ("module", "t"),
        *((f"{what}, {side}", "n") for what in ("kept", "released", "time again") for side in "ab"),
    ]
    return render(
        "comparison.html.jinja",
        heading=f"{names[0]} and {names[1]}",
        subtitle=f"a: {sides[0]}; b: {sides[1]}",
        notes=[f"{note[0].upper()}{note[1:]}." for note in comparison.notes],
        figures_head=head,
        figures=[(row.label, row.first, row.second, row.difference) for row in comparison.figures],
        colours=[("store", "store-all"), ("plan", "a"), ("other", "b"), ("budget", "budgets")],
        memory=Figure.of(memory_of_two(first, second).svg),
        curve=Figure.of(curve_of_two(first, second).svg),
        modules_head=modules_head,
        modules=[_cells(row) for row in comparison.modules],
    )


def _cells(row: ModuleDifference) -> tuple[str, ...]:
    seconds = (format_seconds(s) if s else "0" for s in row.recomputed_seconds)
    return (row.label, *map(size_cell, (*row.kept_bytes, *row.released_bytes)), *seconds)
