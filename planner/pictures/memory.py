"""Memory over the step: store-all, one or two plans, the budget, and below it the biggest tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graph_capture.formats import format_bytes, format_seconds
from graph_capture.graph import Graph
from planner.pictures.lanes import Lane
from planner.pictures.svg import Scale, byte_ticks, path, picture, second_ticks, tag, text
from planner.pictures.timeline import Bin, Timeline

LANE_HEIGHT = 15


@dataclass(frozen=True)
class MemoryPicture:
    """What is drawn.

    **Fields:**

    - `graphs`, `timelines`, `classes`: one each per curve; the class (`store`, `plan`, `other`) is its colour. The
      background shows the programs of the last curve, and pointing at it names its operators.
    - `budgets`: lines across, each with its label. `lanes`: the biggest tensors of the last curve.
    """

    graphs: Sequence[Graph]
    timelines: Sequence[Timeline]
    classes: Sequence[str]
    budgets: Sequence[tuple[str, int]]
    lanes: Sequence[Lane] = ()

    def svg(self, width: int = 960, height: int = 320) -> str:
        """The picture; `height` without the lanes."""
        return _Drawing(self, width, height).draw()


class _Drawing:
    def __init__(self, data: MemoryPicture, width: int, height: int) -> None:
        self.data, self.width, self.height = data, width, height
        self.narrow = width < 600
        end = max((t.end_seconds for t in data.timelines), default=0.0)
        top = max([b for t in data.timelines for b in t.size_bytes] + [size for _, size in data.budgets], default=1)
        self.x = Scale(0.0, end, 62.0, width - 10.0)
        self.y = Scale(0.0, top * 1.06, height - 34.0, 24.0)
        self.parts: list[str] = []

    def draw(self) -> str:
        self._programs()
        self._axes()
        for timeline, class_ in zip(self.data.timelines, self.data.classes, strict=True):
            self._curve(timeline, class_)
        self._budgets()
        for timeline, class_ in zip(self.data.timelines, self.data.classes, strict=True):
            self._peak(timeline, class_)
        self._slices()
        bottom = self._lanes(self.height + 6.0) if self.data.lanes else float(self.height)
        names = ", ".join(t.label for t in self.data.timelines)
        return picture(self.width, bottom, self.parts, f"Memory in use over one training step: {names}")

    def _programs(self) -> None:
        for program, start, end in self.data.timelines[-1].spans():
            left, right = self.x(start), self.x(end)
            self.parts.append(tag("line", x1=right, x2=right, y1=self.y.end, y2=self.y.start, class_="grid"))
            if program != "backward":
                tall = self.y.start - self.y.end
                band = tag("rect", class_="band", x=left, y=self.y.end, width=right - left, height=tall)
                self.parts.append(band)
            if right - left > 7 * len(program):
                self.parts.append(text((left + right) / 2, 16, program, class_="soft", anchor="middle"))

    def _axes(self) -> None:
        for mark, label in byte_ticks(self.y.high, 6):
            y = self.y(mark)
            self.parts.append(tag("line", x1=self.x.start, x2=self.x.end, y1=y, y2=y, class_="grid"))
            self.parts.append(text(self.x.start - 6, y + 4, label, class_="soft", anchor="end"))
        marks = second_ticks(self.x.high, 4 if self.narrow else 9)
        for number, (mark, label) in enumerate(marks):
            last = number == len(marks) - 1 and self.x(mark) > self.x.end - 30
            anchor = "end" if last else "middle"
            self.parts.append(text(self.x(mark), self.y.start + 17, label, class_="soft", anchor=anchor))

    def _bins(self, timeline: Timeline) -> list[Bin]:
        return timeline.bins(max(1, int(self.x.end - self.x.start) // 2), self.x.high)

    def _curve(self, timeline: Timeline, class_: str) -> None:
        slices = self._bins(timeline)
        step = (self.x.end - self.x.start) / max(1, int(self.x.end - self.x.start) // 2)
        points: list[tuple[float, float]] = []
        for one in slices:
            left = self.x.start + one.number * step
            points.append((left, self.y(one.highest_bytes)))
            if one.lowest_bytes < one.highest_bytes:
                points.append((left + step / 2, self.y(one.lowest_bytes)))
        if not points:
            return
        points.append((self.x(timeline.end_seconds), points[-1][1]))
        ground = [(points[-1][0], self.y.start), (points[0][0], self.y.start)]
        if class_ != "store":
            self.parts.append(tag("path", d=path([*points, *ground]), class_=f"area f-{class_}"))
        self.parts.append(tag("path", d=path(points), class_=f"line s-{class_}"))

    def _budgets(self) -> None:
        highest = max((size for _, size in self.data.budgets), default=0)
        for number, (label, size) in enumerate(self.data.budgets):
            y = self.y(size)
            self.parts.append(tag("line", x1=self.x.start, x2=self.x.end, y1=y, y2=y, class_="s-budget"))
            # Where several budgets are close to each other, their labels stand apart, on either side of the lines.
            x, anchor = (self.x.end - 4, "end") if number % 2 == 0 else (self.x.start + 4, "start")
            y += -5 if size == highest else 13
            self.parts.append(text(x, y, label, class_="budget halo", anchor=anchor))

    def _peak(self, timeline: Timeline, class_: str) -> None:
        if not timeline.size_bytes:
            return
        position = timeline.peak_position
        size = timeline.size_bytes[position]
        x, y = self.x((timeline.starts_seconds[position] + timeline.starts_seconds[position + 1]) / 2), self.y(size)
        label = f"{timeline.label}: peak {format_bytes(size)}"
        self.parts.append(tag("circle", cx=x, cy=y, r=3.5, class_=f"f-{class_}", title=label))
        if len(self.data.timelines) > 2:
            return  # the curves of two plans lie close to each other, and the page has a key
        anchor = "start" if x < (self.x.start + self.x.end) / 2 else "end"
        place = x + (9 if anchor == "start" else -9)
        name = f"{timeline.label} {format_bytes(size, short=True)}"
        if class_ == "store":
            y += 4
        else:  # a plan's peak is right under its budget's line: its name stands under the curve
            reach = (place, place + 7.0 * len(name)) if anchor == "start" else (place - 7.0 * len(name), place)
            y = min(self._lowest(timeline, *reach) + 16, self.y.start - 6)
        self.parts.append(text(place, y, name, class_=f"{class_} halo", anchor=anchor))

    def _lowest(self, timeline: Timeline, left: float, right: float) -> float:
        """Where a curve is lowest in the picture, between two places across."""
        bins = self._bins(timeline)
        step = (self.x.end - self.x.start) / max(1, int(self.x.end - self.x.start) // 2)
        heights = [self.y(one.lowest_bytes) for one in bins if left <= self.x.start + one.number * step <= right]
        return max(heights, default=self.y.start)

    def _slices(self) -> None:
        """Invisible columns that say, when pointed at, what runs there; no script is needed."""
        timeline, graph = self.data.timelines[-1], self.data.graphs[-1]
        count = max(1, int(self.x.end - self.x.start) // 6)
        step = (self.x.end - self.x.start) / count
        others = [{b.number: b for b in t.bins(count, self.x.high)} for t in self.data.timelines]
        for one in timeline.bins(count, self.x.high):
            operator = graph.operators[timeline.operators[one.position]]
            again = ", a recomputation" if timeline.again[one.position] else ""
            lines = [
                f"{format_seconds(timeline.starts_seconds[one.position])}: {operator.target} ({operator.phase}{again})"
            ]
            lines += [part for part in (operator.module, operator.source) if part]
            for curve, bins in zip(self.data.timelines, others, strict=True):
                if one.number in bins:
                    lines.append(f"{curve.label}: {format_bytes(bins[one.number].highest_bytes, short=True)}")
            left, tall, said = self.x.start + one.number * step, self.y.start - self.y.end, "\n".join(lines)
            self.parts.append(tag("rect", title=said, class_="slice", x=left, y=self.y.end, width=step, height=tall))

    def _lanes(self, top: float) -> float:
        self.parts.append(text(self.x.start, top + 10, "when the biggest tensors are in memory", class_="soft"))
        y = top + 20.0
        for lane in self.data.lanes:
            name = f"{format_bytes(lane.size_bytes, short=True)}  {lane.label}  {_target(lane.target)}"
            name = _cut(name, int((self.x.end - self.x.start) / 6.2))
            y += LANE_HEIGHT
            self.parts.append(text(self.x.start, y - 3, name, class_="small", title=f"{lane.label}: {lane.tensor}"))
            self.parts.extend(self._stays(lane, y))
            y += LANE_HEIGHT - 2
        return y + 6

    def _stays(self, lane: Lane, y: float) -> list[str]:
        drawn: dict[tuple[int, int, bool], str] = {}
        for stay in lane.stays:
            left, right = self.x(stay.start_seconds), max(self.x(stay.end_seconds), self.x(stay.start_seconds) + 1.5)
            said = f"{stay.module or '(model itself)'}: {lane.tensor}, {_target(lane.target)}"
            span = f"{format_seconds(stay.start_seconds)} to {format_seconds(stay.end_seconds)}"
            kind = "f-again" if stay.again else "f-kept"
            drawn[int(left), int(right), stay.again] = tag(
                "rect",
                x=left,
                y=y,
                width=right - left,
                height=LANE_HEIGHT - 7,
                class_=f"stay {kind}",
                title=f"{said}\n{'recomputed, ' if stay.again else ''}{span}",
            )
        return list(drawn.values())


def _target(target: str) -> str:
    return target.removeprefix("aten.").removesuffix(".default")


def _cut(label: str, length: int) -> str:
    return label if len(label) <= length else f"{label[: max(1, length - 1)]}…"
