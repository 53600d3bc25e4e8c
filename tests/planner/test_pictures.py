"""Pictures: the data that they draw is exact, the drawings are well-formed, and no name gets out of its text."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from xml.etree import ElementTree

import pytest

from graph_capture.graph import Graph
from planner.errors import PlannerError
from planner.pictures.blocks import blocks_of
from planner.pictures.curve import CurvePicture
from planner.pictures.graph import graph_svg
from planner.pictures.labels import Labels
from planner.pictures.lanes import lanes_of
from planner.pictures.memory import MemoryPicture
from planner.pictures.of_plan import curve_of_plan, memory_of_plan, memory_of_two, timelines_of_plan
from planner.pictures.plots import check_plot_path, save_plot
from planner.pictures.points import Point
from planner.pictures.svg import Scale, byte_ticks, second_ticks, standalone, tag, ticks
from planner.pictures.timeline import timeline_of
from planner.plan_file import Plan
from solvers.schedule import Schedule
from solvers.simulator import simulate
from tests.planner.plans import RECOMPUTE_ONE, chain, make_plan, plan_fields

NASTY = "<script>alert('1')</script>&\"$x$"


def nasty_plan() -> Plan:
    """A plan whose names are hostile."""
    graph = chain()
    operators = tuple(dataclasses.replace(o, module=NASTY, source=NASTY, target=NASTY) for o in graph.operators)
    return Plan(**plan_fields(dataclasses.replace(graph, operators=operators), (*RECOMPUTE_ONE, 12)))


def test_the_timeline_is_the_simulators() -> None:
    plan = make_plan()
    before, after = timelines_of_plan(plan)
    assert after.size_bytes == plan.simulation().timeline_bytes
    assert after.starts_seconds[:7] == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert after.end_seconds == 20.0
    assert before.end_seconds == 19.0
    assert after.spans() == [("forward", 0.0, 6.0), ("backward", 6.0, 20.0)]
    assert [p for p, again in enumerate(after.again) if again] == [8]
    assert after.size_bytes[after.peak_position] == plan.predicted_peak_bytes


@pytest.mark.parametrize("count", [1, 3, 20, 500])
def test_thinning_loses_no_peak(count: int) -> None:
    _, timeline = timelines_of_plan(make_plan())
    bins = timeline.bins(count, timeline.end_seconds)
    assert max(b.highest_bytes for b in bins) == max(timeline.size_bytes)
    assert min(b.lowest_bytes for b in bins) == min(timeline.size_bytes)
    assert [b.number for b in bins] == list(range(count))  # every slice of the step has an operator


def test_lanes_hold_the_biggest_tensors_and_their_second_stay() -> None:
    plan = make_plan()
    graph = plan.to_graph()
    _, timeline = timelines_of_plan(plan)
    lanes = lanes_of(graph, plan.to_schedule(), timeline, later=False, count=2)
    first = lanes[0]
    assert (first.label, first.values, first.size_bytes, first.tensor) == (
        "layers.{0-5}",
        6,
        600,
        "float32[5, 5]",
    )
    again = [stay for stay in first.stays if stay.again]
    assert [(stay.module, stay.start_seconds) for stay in again] == [("layers.3", 10.0)]


def test_blocks_are_drawn_once_and_coloured_by_decision() -> None:
    plan = make_plan()
    blocks = blocks_of(plan.to_graph(), plan.to_schedule())
    assert [(b.label, b.blocks, b.cells[0].decision) for b in blocks] == [
        ("layers.{0-2,4-5}", 5, "kept"),
        ("layers.3", 1, "again"),
    ]
    assert [b.entering for b in blocks] == [{0}, {0}]


def test_writing_a_buffer_does_not_cut_a_block_in_two() -> None:
    graph = chain(2)
    values = (graph.values[0], dataclasses.replace(graph.values[1], size_bytes=0), *graph.values[2:])
    write = dataclasses.replace(graph.operators[1], module="")
    graph = dataclasses.replace(graph, operators=(graph.operators[0], write, *graph.operators[2:]), values=values)
    assert [(b.label, len(b.cells)) for b in blocks_of(graph, Schedule.store_all(graph))] == [("layers.0", 2)]


def test_an_operator_that_must_not_run_twice_has_its_own_colour() -> None:
    graph = chain()
    once = dataclasses.replace(graph.operators[1], recomputable=False, keep_reason="it changes a buffer")
    graph = dataclasses.replace(graph, operators=(graph.operators[0], once, *graph.operators[2:]))
    cells = [cell for block in blocks_of(graph, Schedule.store_all(graph)) for cell in block.cells]
    assert [c.decision for c in cells if c.note] == ["pinned"]
    assert "it changes a buffer" in graph_svg(blocks_of(graph, Schedule.store_all(graph)))


def drawings(plan: Plan) -> list[str]:
    """Every kind of drawing, at both widths."""
    pictures = [memory_of_plan(plan), memory_of_two(plan, plan), curve_of_plan(plan)]
    drawn = [picture.svg(width) for picture, width in itertools.product(pictures, (1070, 360))]
    return [*drawn, graph_svg(blocks_of(plan.to_graph(), plan.to_schedule())), standalone(drawn[0])]


@pytest.mark.parametrize("plan", [make_plan(), nasty_plan()], ids=["plain", "hostile names"])
def test_drawings_are_well_formed_and_stay_in_their_frame(plan: Plan) -> None:
    for drawing in drawings(plan):
        root = ElementTree.fromstring(drawing)
        width = float(root.attrib["width"])
        names = {element.tag.rsplit("}")[-1] for element in root.iter()}
        assert names <= {"svg", "g", "rect", "path", "line", "circle", "text", "title", "style"}
        for element in root.iter():
            for key in ("x", "cx", "x1", "x2"):
                assert -10 <= float(element.attrib.get(key, 0)) <= width


def test_a_step_without_operators_can_be_drawn() -> None:
    graph = Graph((), (), {"parameters": 10})
    schedule = Schedule.store_all(graph)
    timeline = timeline_of("empty", graph, schedule, simulate(graph, schedule))
    assert timeline.spans() == []
    assert timeline.bins(5, 0.0) == []
    assert lanes_of(graph, schedule, timeline, later=False) == []
    memory = MemoryPicture((graph,), (timeline,), ("plan",), [("budget", 20)])
    for drawing in (memory.svg(), CurvePicture([Point("it", "plan", 20, 10, 0.0)]).svg(), CurvePicture([]).svg()):
        ElementTree.fromstring(drawing)


def test_a_curve_has_its_bound_beside_it() -> None:
    curve = [Point(f"{b}", "plan", 1000 * b, 990 * b, 1 / b, 0.9 / b) for b in (1, 2, 3)]
    drawing = CurvePicture([], curve).svg()
    assert drawing.count('class="line s-plan"') == 1
    assert drawing.count('class="line s-store"') == 1


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 0.11, 6) == pytest.approx([0.0, 0.02, 0.04, 0.06, 0.08, 0.1])
    assert byte_ticks(3 * 2**30, 4) == [(0.0, "0"), (2.0**30, "1 GiB"), (2.0**31, "2 GiB"), (3.0 * 2**30, "3 GiB")]
    assert second_ticks(0.02, 2) == [(0.0, "0"), (0.01, "10 ms"), (0.02, "20 ms")]
    assert ticks(5.0, 5.0, 3) == [5.0]
    assert Scale(0.0, 0.0, 3.0, 9.0)(7.0) == 3.0


def test_attributes_and_titles_are_escaped() -> None:
    assert tag("rect", title="<b>", class_='"') == '<rect class="&quot;"><title>&lt;b&gt;</title></rect>'


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plots_are_written(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an optional extra")
    plan = nasty_plan()
    path = tmp_path / f"plot.{suffix}"
    save_plot(str(path), NASTY, memory_of_plan(plan), curve_of_plan(plan))
    content = path.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    if suffix == "svg":
        assert b"<script" not in content
        save_plot(str(path), NASTY, memory_of_plan(plan), curve_of_plan(plan))
        assert path.read_bytes() == content  # the same plan, the same file


def test_a_plot_of_another_kind_is_refused() -> None:
    with pytest.raises(PlannerError, match=r"--plot out.bmp: a plot is written as .png, .svg, .pdf"):
        check_plot_path("out.bmp")


def test_labels_stand_clear_of_marks_lines_and_each_other() -> None:
    labels = Labels((0.0, 0.0, 200.0, 100.0), height=10.0, apart=8.0)
    labels.keep_clear(50.0, 50.0)
    labels.keep_clear(90.0, 50.0)
    labels.keep_line_clear([(0.0, 80.0), (200.0, 80.0)])
    assert labels.place(90.0, 50.0, 30.0) == (98.0, 50.0)
    assert labels.place(50.0, 50.0, 30.0) == (12.0, 50.0)  # to the right is the other mark
    assert labels.place(50.0, 50.0, 30.0) == (58.0, 61.0)  # both sides are taken: below
    assert labels.place(180.0, 76.0, 30.0) == (142.0, 87.0)  # the edge is to the right, then the line: below
    assert labels.place(100.0, 50.0, 300.0) is None
