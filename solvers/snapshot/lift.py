"""From a point of the relaxation to a whole sequence of executions, just in time and depth first.

The operators of a segment run in captured order; what is missing is recomputed right before it is needed, its own
missing inputs first. What the point keeps at the next instant and what is not there is recomputed at the end of the
segment. The sequence is always legal (a use binds to the latest execution); whether it fits is for the simulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graph_capture.graph import Graph
from solvers.snapshot.reduction import Reduction
from solvers.snapshot.relaxation import Relaxation


def lift(reduction: Reduction, relaxation: Relaxation, point: Mapping[int, float]) -> list[int]:
    """The sequence of executions that a point of `relaxation` (column -> value) stands for."""
    order: list[int] = []
    kept = [{v for v, column in columns.items() if point.get(column, 0.0) > 0.5} for columns in relaxation.keep]
    kept.append(set())
    for i, (start, end) in enumerate(zip(relaxation.instants, relaxation.ends, strict=True)):
        present = set(kept[i])
        for j in range(start, end):
            for value in reduction.inputs[j]:
                _provide(reduction, value, present, order)
            order.append(j)
            present.update(reduction.outputs[j])
        for value in sorted(kept[i + 1], key=lambda v: reduction.graph.values[v].producer):
            _provide(reduction, value, present, order)
    return prune(reduction.graph, order)


def _provide(reduction: Reduction, value: int, present: set[int], order: list[int]) -> None:
    """Append the recomputations that make `value`, depth first, without recursion: chains are thousands long."""
    stack = [(value, False)]
    while stack:
        wanted, inputs_done = stack.pop()
        producer = reduction.graph.values[wanted].producer
        if wanted in present or not reduction.repeatable[producer]:
            continue  # what cannot be made again is still there
        if inputs_done:
            order.append(producer)
            present.update(reduction.outputs[producer])
        else:
            stack.append((wanted, True))
            stack.extend((v, False) for v in reversed(reduction.inputs[producer]) if v not in present)


def prune(graph: Graph, order: Sequence[int]) -> list[int]:
    """Drop recomputations whose values nobody reads before they are made again."""
    first: dict[int, int] = {}
    for position, index in enumerate(order):
        first.setdefault(index, position)
    wanted: set[int] = set()
    kept: list[int] = []
    for position in range(len(order) - 1, -1, -1):
        operator = graph.operators[order[position]]
        if first[order[position]] != position and wanted.isdisjoint(operator.outputs):
            continue
        kept.append(order[position])
        wanted.difference_update(operator.outputs)
        wanted.update(operator.inputs)
    return kept[::-1]
