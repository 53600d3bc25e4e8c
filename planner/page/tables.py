"""Cells of the tables that several pages show."""

from __future__ import annotations

from markupsafe import Markup

from graph_capture.formats import format_bytes, format_fraction
from planner.pictures.points import Point

Table = list[tuple["str | Markup", ...]]
POINTS_HEAD = [("schedule", "t"), ("budget", "n"), ("peak", "n"), ("overhead", "n"), ("lower bound", "n")]


def point_cells(point: Point) -> tuple[str, ...]:
    """One row of the table under a curve."""
    bound = "" if point.lower_bound is None else format_fraction(point.lower_bound)
    budget = "" if point.budget_bytes == point.peak_bytes else size_cell(point.budget_bytes)
    return point.label, budget, size_cell(point.peak_bytes), format_fraction(point.overhead), bound


def size_cell(size_bytes: int) -> str:
    """Bytes in their short form."""
    return format_bytes(size_bytes, short=True)
