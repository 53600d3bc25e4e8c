"""Store everything: the schedule without recomputation, the 100 % that fractions of a budget refer to.

*Search class*: one schedule (every operator once, in captured order). *Bound*: 0, which is trivially valid for every
schedule; so where the schedule fits it is optimal, and where it does not the solver knows nothing else to try.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graph_capture.graph import Graph
from solvers.hints import NO_HINTS, Hints
from solvers.schedule import Schedule
from solvers.solution import SearchClass, Solution, Solver
from solvers.verdict import Verdict, judge


@dataclass(frozen=True)
class StoreAll(Solver):
    """Every operator once. Use it to learn what the step needs without a planner."""

    name: ClassVar[str] = "store-all"

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """The store-all schedule if it fits the budget."""
        verdict = Verdict.start(self, graph, budget_bytes, SearchClass.STORE_ALL)
        reason = self.applies_to(graph)
        if reason is not None and not verdict.below_floor:
            return verdict.not_applicable(reason)
        return verdict.conclude([judge(graph, Schedule.store_all(graph))])

    def applies_to(self, graph: Graph) -> str | None:
        """Not to a graph with values that must be recomputed."""
        count = len(graph.released)
        return f"it recomputes nothing, and {count} values are to be recomputed" if count else None
