"""The same pictures with matplotlib, for `--plot out.png` and `--plot out.svg`; matplotlib is imported only here."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from graph_capture.formats import format_bytes
from planner.errors import PlannerError
from planner.pictures.curve import CurvePicture, stairs
from planner.pictures.labels import Labels
from planner.pictures.lanes import Lane
from planner.pictures.memory import MemoryPicture
from planner.pictures.points import Point
from planner.pictures.svg import LIGHT, byte_ticks, second_ticks

Axes: TypeAlias = Any
"""matplotlib's axes, whose published types are partial."""

SUFFIXES = (".png", ".svg", ".pdf")
_COLOURS = {"store": "store", "plan": "plan", "other": "other", "classic": "pinned", "by hand": "again"}
_MARKS = {"store": "s", "plan": "o", "other": "o", "classic": "D", "by hand": "s"}


def check_plot_path(path: str) -> None:
    """Raise :class:`~planner.errors.PlannerError` if no plot can be written there, before any work is done."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise PlannerError(f"--plot {path}: a plot is written as {', '.join(SUFFIXES)}; give the file such a name")
    if importlib.util.find_spec("matplotlib") is None:
        raise PlannerError("--plot needs matplotlib, which is not installed: pip install 'checkpoint-planner[plots]'")


def save_plot(path: str, title: str, memory: MemoryPicture | None, curve: CurvePicture) -> None:
    """Draw memory over the step, if there is one, above overhead against memory."""
    import matplotlib
    from matplotlib.figure import Figure

    lanes = memory.lanes[:8] if memory is not None else ()
    heights = [*([4.2] if memory is not None else []), *([0.3 + 0.28 * len(lanes)] if lanes else []), 4.2]
    # Text stays text in SVG, ids do not change from run to run, and no file holds its date.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "plan", "font.size": 9}
    library: Any = matplotlib
    with library.rc_context(style):
        figure: Any = Figure(figsize=(10, sum(heights) + 0.4), layout="constrained")
        axes: Sequence[Axes] = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        if memory is not None:
            _memory(axes[0], memory)
        if memory is not None and lanes:
            _lanes(axes[1], lanes, axes[0].get_xlim())
        _curve(axes[-1], curve)
        figure.suptitle(_plain(title))
        figure.draw_without_rendering()  # sets the places of the axes, which those of the labels depend on
        _name_points(axes[-1], curve)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.lower().endswith(".svg") else {})


def _memory(axes: Axes, data: MemoryPicture) -> None:
    for timeline, class_ in zip(data.timelines, data.classes, strict=True):
        sizes = [*timeline.size_bytes, *timeline.size_bytes[-1:]]
        label = f"{timeline.label}: peak {format_bytes(max(sizes, default=0), short=True)}"
        line = {"color": LIGHT[class_], "linewidth": 1.2, "where": "post", "label": label}
        axes.step(timeline.starts_seconds[: len(sizes)], sizes, **line)
    for label, size in data.budgets:
        axes.axhline(size, color=LIGHT["budget"], linestyle="--", linewidth=1, label=label)
    for program, start, end in data.timelines[-1].spans():
        if program == "forward":
            axes.axvspan(start, end, color=LIGHT["panel"], zorder=0)
        if end > start:
            axes.text((start + end) / 2, 0.98, program, transform=axes.get_xaxis_transform(), ha="center", va="top")
    end, top = max(t.end_seconds for t in data.timelines), axes.get_ylim()[1]
    _ticks(axes, second_ticks(end, 8), byte_ticks(top, 6))
    axes.set_xlim(0, end or 1)
    axes.set_ylim(0, 1.08 * top)
    axes.set_title("Memory in use over the step")
    axes.legend(loc="lower center", ncols=2, frameon=False)


def _lanes(axes: Axes, lanes: Sequence[Lane], across: tuple[float, float]) -> None:
    """When the biggest tensors are in memory: a bar for every stay, the name above."""
    for number, lane in enumerate(lanes):
        for stay in lane.stays:
            colour = LIGHT["again" if stay.again else "kept"]
            ends = [stay.start_seconds, stay.end_seconds]
            axes.plot(ends, [-number, -number], color=colour, linewidth=3.5, alpha=0.6, solid_capstyle="butt")
        name = f"{format_bytes(lane.size_bytes, short=True)} {lane.label} {lane.target.removeprefix('aten.')}"
        axes.text(across[0] + 0.004 * across[1], 0.18 - number, _plain(name), fontsize=6.5, va="bottom")
    axes.set_xlim(*across)
    axes.set_ylim(-len(lanes) + 0.6, 0.9)
    axes.set_axis_off()
    axes.set_title("When the biggest tensors are in memory", fontsize=9)


def _curve(axes: Axes, data: CurvePicture) -> None:
    curve = sorted(data.curve, key=lambda p: p.budget_bytes)
    if curve:
        sizes = [p.budget_bytes for p in curve]
        overheads = [p.overhead for p in curve]
        axes.step(sizes, overheads, "o-", where="post", color=LIGHT["plan"], markersize=4, label="planned")
        proven = [(p.budget_bytes, p.lower_bound) for p in curve if p.lower_bound is not None]
        if proven:
            axes.step(*zip(*proven, strict=True), where="pre", color=LIGHT["store"], label="lower bound")
        axes.legend(frameon=False)
    for point in data.points:
        _point(axes, point)
    top = max([p.overhead for p in (*data.points, *curve)], default=0.0) or 0.01
    sizes = [size for p in (*data.points, *curve) for size in (p.peak_bytes, p.budget_bytes)]
    low, high = min(sizes, default=0), max(sizes, default=1)
    _ticks(axes, byte_ticks(high, 8, low=low), [])
    span = high - low or high or 1
    axes.set_xlim(low - 0.05 * span, high + 0.12 * span)
    axes.set_ylim(-0.03 * top, 1.12 * top)
    axes.yaxis.set_major_formatter(_percent)
    axes.set_title("Overhead of the step against its peak memory")
    axes.grid(True, axis="y", color=LIGHT["line"])


def _point(axes: Axes, point: Point) -> None:
    colour = LIGHT[_COLOURS[point.kind]]
    axes.plot([point.peak_bytes], [point.overhead], _MARKS[point.kind], color=colour, markersize=6)
    if point.lower_bound is not None:
        axes.plot([point.budget_bytes], [point.lower_bound], "_", color=LIGHT["budget"], markersize=14)


def _name_points(axes: Axes, data: CurvePicture) -> None:
    """Labels beside the marks; where there is no room, a mark goes without."""
    box = axes.get_window_extent()
    unit = axes.figure.dpi / 72  # pixels of a point

    def at(size_bytes: float, overhead: float) -> tuple[float, float]:
        across, up = axes.transData.transform((size_bytes, overhead))
        return float(across) / unit, -float(up) / unit

    area = box.x0 / unit, -box.y1 / unit, box.x1 / unit, -box.y0 / unit
    labels = Labels(area, height=10.0, apart=9.0)
    for point in (*data.curve, *data.points):
        labels.keep_clear(*at(point.peak_bytes, point.overhead), half=4.0)
    curve = sorted(data.curve, key=lambda p: p.budget_bytes)
    labels.keep_line_clear(stairs([at(p.budget_bytes, p.overhead) for p in curve], after=True))
    for point in sorted(data.points, key=lambda p: (p.kind not in ("plan", "other"), p.peak_bytes)):
        x, y = at(point.peak_bytes, point.overhead)
        place = labels.place(x, y, 4.9 * len(point.label))
        if place is not None:
            offset = {"xytext": (place[0] - x, y - place[1]), "textcoords": "offset points", "va": "center"}
            where = point.peak_bytes, point.overhead
            axes.annotate(_plain(point.label), where, fontsize=8, color=LIGHT[_COLOURS[point.kind]], **offset)


def _ticks(axes: Axes, across: list[tuple[float, str]], up: list[tuple[float, str]]) -> None:
    axes.set_xticks([mark for mark, _ in across], [label for _, label in across])
    if up:
        axes.set_yticks([mark for mark, _ in up], [label for _, label in up])


def _percent(fraction: float, place: int) -> str:
    return f"{100 * fraction:.3g} %"


def _plain(name: str) -> str:
    """Names with dollar signs are no mathematics."""
    return name.replace("$", r"\$")
