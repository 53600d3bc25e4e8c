"""What the pictures need, from plans."""

from __future__ import annotations

from graph_capture.formats import format_bytes
from planner.pictures.curve import CurvePicture
from planner.pictures.lanes import lanes_of
from planner.pictures.memory import MemoryPicture
from planner.pictures.points import Point, PointKind, reference_points
from planner.pictures.timeline import Timeline, timeline_of
from planner.plan_file import Plan
from solvers.schedule import Schedule


def timelines_of_plan(plan: Plan, label: str = "plan") -> tuple[Timeline, Timeline]:
    """The step that keeps everything, and the plan's."""
    graph = plan.to_graph()
    return (
        timeline_of("store-all", graph, Schedule.store_all(graph), plan.store_all_simulation()),
        timeline_of(label, graph, plan.to_schedule(), plan.simulation()),
    )


def memory_of_plan(plan: Plan) -> MemoryPicture:
    """Memory over the step of one plan, with its biggest tensors."""
    graph = plan.to_graph()
    before, after = timelines_of_plan(plan)
    lanes = lanes_of(graph, plan.to_schedule(), after, later=plan.regime == "later")
    budget = f"budget {format_bytes(plan.budget_bytes, short=True)}"
    return MemoryPicture((graph, graph), (before, after), ("store", "plan"), [(budget, plan.budget_bytes)], lanes)


def memory_of_two(first: Plan, second: Plan) -> MemoryPicture:
    """Memory over the step of two plans, over the step that keeps everything of the first one's graph."""
    before, one = timelines_of_plan(first, "a")
    _, other = timelines_of_plan(second, "b")
    graphs = (first.to_graph(), first.to_graph(), second.to_graph())
    budgets = [
        (f"budget of {name}: {format_bytes(plan.budget_bytes, short=True)}", plan.budget_bytes)
        for name, plan in (("a", first), ("b", second))
    ]
    same = first.budget_bytes == second.budget_bytes
    return MemoryPicture(graphs, (before, one, other), ("store", "plan", "other"), budgets[:1] if same else budgets)


def curve_of_plan(plan: Plan) -> CurvePicture:
    """One plan beside store-all, Chen's segments, and what is done by hand."""
    return CurvePicture([plan_point(plan, "this plan"), *reference_points(plan.to_graph(), [plan.budget_bytes])])


def curve_of_two(first: Plan, second: Plan) -> CurvePicture:
    """Two plans beside what else could be done with the first one's graph."""
    points = [plan_point(first, "a"), plan_point(second, "b", "other")]
    budgets = dict.fromkeys((first.budget_bytes, second.budget_bytes))
    return CurvePicture([*points, *reference_points(first.to_graph(), budgets)])


def title_of(plan: Plan) -> str:
    """Model and budget in a few words."""
    return f"{plan.model.class_name.rsplit('.', 1)[-1]} within {format_bytes(plan.budget_bytes, short=True)}"


def plan_point(plan: Plan, label: str, kind: PointKind = "plan") -> Point:
    """The point of a plan in a picture of overhead against memory."""
    bound = plan.lower_bound or None
    return Point(label, kind, plan.budget_bytes, plan.predicted_peak_bytes, plan.overhead, bound)
