"""Random legal orders of first executions."""

from __future__ import annotations

import random

from graph_capture.graph import Graph
from solvers.precedence import precedence


def random_order(graph: Graph, rng: random.Random) -> list[int]:
    """A topological order of the legal precedence, each next operator drawn from those that may run."""
    before = precedence(graph)
    missing = {operator: before.in_degree(operator) for operator in before.nodes}
    ready = [operator for operator, count in missing.items() if count == 0]
    order: list[int] = []
    while ready:
        operator = ready.pop(rng.randrange(len(ready)))
        order.append(operator)
        for later in before.successors(operator):
            missing[later] -= 1
            if missing[later] == 0:
                ready.append(later)
    return order
