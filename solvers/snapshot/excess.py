"""Where a sequence of executions exceeds the budget: what the next relaxation is to ask about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from graph_capture.graph import Graph
from solvers.schedule import outside_loss
from solvers.simulator import Simulation

_NEAR = (-3, -2, -1, 1, 2, 3)


@dataclass(frozen=True)
class Excess:
    """Bytes in memory where they are more than the budget.

    **Fields:**

    - `at`: by captured position; a burst of recomputation counts for the operator behind it.
    - `reruns`: by recomputed operator, the one execution of each burst at which most is in memory.
    """

    at: dict[int, int] = field(default_factory=dict[int, int])
    reruns: dict[int, int] = field(default_factory=dict[int, int])

    def __bool__(self) -> bool:
        return bool(self.at)

    def worst(self, most: int, apart: int, known: set[int]) -> list[int]:
        """Up to `most` positions that are not known, the worst first, more than `apart` operators from each other."""
        fresh: list[int] = []
        for j in sorted(self.at, key=lambda j: -self.at[j]):
            if j not in known and all(abs(j - other) > apart for other in fresh):
                fresh.append(j)
            if len(fresh) == most:
                break
        return fresh

    def local_maxima(self) -> set[int]:
        """Positions with no worse one next to them."""
        return {j for j in self.at if all(self.at[j] >= self.at.get(j + d, 0) for d in _NEAR)}


def excess_of(graph: Graph, order: Sequence[int], simulation: Simulation, budget_bytes: int) -> Excess:
    """Where the sequence, which was simulated, exceeds the budget."""
    executions = outside_loss(graph, order)
    seen: set[int] = set()
    is_first: list[bool] = []
    for index in executions:
        is_first.append(index not in seen)
        seen.add(index)
    excess = Excess()
    behind, worst = len(graph) - 1, (budget_bytes, -1)
    for position in range(len(executions) - 1, -2, -1):
        if position < 0 or is_first[position]:  # the burst before `behind` is over
            if worst[1] >= 0:
                excess.reruns[worst[1]] = max(excess.reruns.get(worst[1], 0), worst[0])
            worst = (budget_bytes, -1)
        if position < 0:
            break
        live = simulation.timeline_bytes[position]
        if is_first[position]:
            behind = executions[position]
        elif live > worst[0]:
            worst = (live, executions[position])
        if live > budget_bytes:
            excess.at[behind] = max(excess.at.get(behind, 0), live)
    return excess
