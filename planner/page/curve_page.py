"""The page of a curve of budgets: the picture, and the figures of every point."""

from __future__ import annotations

from collections.abc import Sequence

from graph_capture.formats import format_bytes
from planner.page.render import Figure, render
from planner.page.tables import POINTS_HEAD, point_cells
from planner.pictures.curve import CurvePicture
from planner.pictures.points import Point


def curve_page(name: str, eager_peak_bytes: int, curve: Sequence[Point], others: Sequence[Point]) -> str:
    """The page as text; `others` are single points beside the curve."""
    return render(
        "curve.html.jinja",
        heading=f"{name}: overhead against memory",
        subtitle=f"100 % is eager's peak, {format_bytes(eager_peak_bytes)}",
        curve=Figure.of(CurvePicture(others, curve).svg),
        points_head=POINTS_HEAD,
        points=[point_cells(point) for point in (*curve, *others)],
    )
