"""Overhead against memory: a curve of budgets with its lower bound, single plans, classics, and ways by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from graph_capture.formats import format_bytes, format_fraction
from planner.pictures.labels import Labels
from planner.pictures.points import Point
from planner.pictures.svg import Scale, byte_ticks, path, picture, tag, text, ticks

_CLASSES = {"store": "store", "plan": "plan", "other": "other", "classic": "pinned", "by hand": "again"}


@dataclass(frozen=True)
class CurvePicture:
    """What is drawn: single points, and points that a line joins (in the order of their budgets)."""

    points: Sequence[Point]
    curve: Sequence[Point] = ()

    def svg(self, width: int = 960, height: int = 340) -> str:
        """The picture."""
        return _Drawing(self, width, height).draw()


class _Drawing:
    def __init__(self, data: CurvePicture, width: int, height: int) -> None:
        self.data, self.width, self.height = data, width, height
        self.everything = [*data.curve, *data.points]
        sizes = [size for p in self.everything for size in (p.peak_bytes, p.budget_bytes)] or [1]
        low, high = min(sizes), max(sizes)
        margin = 0.04 * (high - low) or 0.05 * high
        top = max((p.overhead for p in self.everything), default=0.0) or 0.01
        self.x = Scale(max(0.0, low - margin), high + margin, 56.0, width - 12.0)
        self.y = Scale(0.0, 1.1 * top, height - 46.0, 14.0)
        self.parts: list[str] = []
        self.labels = Labels((self.x.start, 0.0, width - 2.0, self.y.start), apart=12.0)

    def draw(self) -> str:
        self._axes()
        self._curve()
        for point in self.data.points:
            self._bound_of(point)
        for point in self.everything:
            self.labels.keep_clear(self.x(point.peak_bytes), self.y(point.overhead))
        marks = [self._mark(point) for point in self.everything]
        for point in sorted(self.data.points, key=lambda p: (p.kind not in ("plan", "other"), p.peak_bytes)):
            self._label(point)
        self.parts.extend(marks)
        return picture(self.width, self.height, self.parts, "Overhead of the step against its peak memory")

    def _axes(self) -> None:
        for mark in ticks(0.0, self.y.high, 6):
            y = self.y(mark)
            self.parts.append(tag("line", x1=self.x.start, x2=self.x.end, y1=y, y2=y, class_="grid"))
            self.parts.append(text(self.x.start - 6, y + 4, f"{100 * mark:.3g} %", class_="soft", anchor="end"))
        for mark, label in byte_ticks(self.x.high, 4 if self.width < 600 else 9, low=self.x.low):
            x = self.x(mark)
            self.parts.append(tag("line", x1=x, x2=x, y1=self.y.start, y2=self.y.start + 4, class_="grid"))
            self.parts.append(text(x, self.y.start + 17, label, class_="soft", anchor="middle"))
        middle = (self.x.start + self.x.end) / 2
        caption = "across: peak memory; up: overhead of the step"
        self.parts.append(text(middle, self.height - 8.0, caption, class_="soft small", anchor="middle"))

    def _curve(self) -> None:
        points = sorted(self.data.curve, key=lambda p: p.budget_bytes)
        found = [(self.x(p.budget_bytes), self.y(p.overhead)) for p in points]
        proven = [(self.x(p.budget_bytes), self.y(p.lower_bound)) for p in points if p.lower_bound is not None]
        # What is proven for a budget holds below it, and what was found for a budget holds above it: stairs.
        for corners, class_ in ((stairs(proven, after=False), "store"), (stairs(found, after=True), "plan")):
            if corners:
                self.parts.append(tag("path", d=path(corners), class_=f"line s-{class_}"))
                self.labels.keep_line_clear(corners)

    def _bound_of(self, point: Point) -> None:
        if point.lower_bound is None:
            return
        x, y = self.x(point.budget_bytes), self.y(point.lower_bound)
        budget, bound = format_bytes(point.budget_bytes), format_fraction(point.lower_bound)
        said = f"no schedule within {budget} costs less than {bound}"
        self.parts.append(tag("line", x1=x - 9, x2=x + 9, y1=y, y2=y, class_="line s-budget", title=said))

    def _mark(self, point: Point) -> str:
        bound = f"\nlower bound {format_fraction(point.lower_bound)}" if point.lower_bound is not None else ""
        said = (
            f"{point.label}\npeak {format_bytes(point.peak_bytes)}\noverhead {format_fraction(point.overhead)}{bound}"
        )
        x, y, class_ = self.x(point.peak_bytes), self.y(point.overhead), f"cell f-{_CLASSES[point.kind]}"
        if point.kind in ("plan", "other"):
            return tag("circle", cx=x, cy=y, r=5, class_=class_, title=said)
        return tag("rect", x=x - 4, y=y - 4, width=8, height=8, class_=class_, title=said)

    def _label(self, point: Point) -> None:
        """Beside its mark; where there is no room, pointing at the mark and the table of the page name it."""
        place = self.labels.place(self.x(point.peak_bytes), self.y(point.overhead), 6.6 * len(point.label))
        if place is not None:
            bold = point.kind if point.kind in ("plan", "other") else "soft"
            self.parts.append(text(place[0], place[1] + 4, point.label, class_=f"{bold} halo"))


def stairs(points: Sequence[tuple[float, float]], *, after: bool) -> list[tuple[float, float]]:
    """Steps through points; each holds up to the next one (`after`), or from the one before."""
    corners: list[tuple[float, float]] = []
    for one, other in itertools.pairwise(points):
        corners += [one, (other[0], one[1]) if after else (one[0], other[1])]
    return [*corners, *points[-1:]]
