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
        return verdict.conclude([judge(graph, Schedule.store_all(graph))])
