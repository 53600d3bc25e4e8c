"""A solver for tests that recomputes as much as it can, whatever the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graph_capture.graph import Graph
from solvers.hints import NO_HINTS, Hints
from solvers.schedule import Schedule
from solvers.solution import SearchClass, Solution, Solver, Status
from solvers.store_all import StoreAll


@dataclass(frozen=True)
class RecomputeAlways(Solver):
    """Before every backward operator, all that it reads is recomputed, several times over in one step.

    Values of every `every`-th forward operator are kept, so that chains stay short. The name is store-all's: a plan
    that has to be made again for another graph recomputes nothing, and takes no time.
    """

    name: ClassVar[str] = StoreAll.name

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """One fixed schedule."""
        schedule = Schedule.from_order(graph, recompute_always(graph))
        scope, search_class = "", SearchClass.STORE_ALL
        return Solution(self.name, Status.FEASIBLE, schedule, 0.0, 0.0, 0, search_class, scope, 0.0)


def recompute_always(graph: Graph, every: int = 6) -> list[int]:
    """The order of that schedule."""
    order: list[int] = []

    def again(index: int, done: set[int]) -> None:
        operator = graph.operators[index]
        if index in done or operator.phase != "forward" or not operator.recomputable or index % every == 0:
            return
        done.add(index)
        for value in operator.inputs:
            again(graph.values[value].producer, done)
        order.append(index)

    for index, operator in enumerate(graph.operators):
        if operator.phase == "backward":
            done: set[int] = set()
            for value in operator.inputs:
                again(graph.values[value].producer, done)
        order.append(index)
    return order
