"""Overhead against memory, as data: plans, a curve of budgets, the classics, and what one does by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from graph_capture.graph import Graph
from planner.by_block import by_block
from solvers.registry import SOLVERS
from solvers.schedule import Schedule
from solvers.solution import overhead_of

PointKind = Literal["store", "plan", "other", "classic", "by hand"]


@dataclass(frozen=True)
class Point:
    """One schedule: the bytes of its peak and its overhead, a fraction of the store-all step.

    **Fields:**

    - `budget_bytes`: what it was made for; the peak itself where it was made for none.
    - `lower_bound`: proven for that budget; `None` if nothing is.
    """

    label: str
    kind: PointKind
    budget_bytes: int
    peak_bytes: int
    overhead: float
    lower_bound: float | None = None


def reference_points(graph: Graph, budgets: Iterable[int]) -> list[Point]:
    """Store-all, `torch.utils.checkpoint` around blocks, and Chen's segments: seconds for thousands of operators."""
    graph = graph.without_released  # what would be done without pins
    found = [point_of("store-all", "store", graph, Schedule.store_all(graph))]
    found += [point_of(one.label, "by hand", graph, one.schedule) for one in by_block(graph)]
    for name in ("chen-sqrt", "chen-greedy"):
        solver = SOLVERS[name].load()()
        if solver.applies_to(graph) is not None:
            continue
        for budget_bytes in budgets:
            solution = solver.solve(graph, budget_bytes)
            # Chen's square root is one schedule, whatever the budget.
            if solution.schedule is not None:
                found.append(point_of(name, "classic", graph, solution.schedule))
    return list(dict.fromkeys(found))


def point_of(label: str, kind: PointKind, graph: Graph, schedule: Schedule) -> Point:
    """A schedule that was made for no budget."""
    overhead, peak_bytes = overhead_of(graph, schedule)
    return Point(label, kind, peak_bytes, peak_bytes, overhead)
