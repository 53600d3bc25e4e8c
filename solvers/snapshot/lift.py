"""From a point of the relaxation to a whole sequence of executions, just in time and depth first.

The operators of a segment run in captured order; what is missing is recomputed right before it is needed, its own
missing inputs first. What the point keeps at the next instant and what is not there is recomputed at the end of the
segment. The sequence is always legal (a use binds to the latest execution); whether it fits is for the simulator.

A point may also keep a value and recompute it in the same segment: it means to have it away in between. With
`early_drops` the lift follows, and drops such a value over the longest stretch in which no operator reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from graph_capture.graph import Graph
from solvers.snapshot.reduction import Reduction
from solvers.snapshot.relaxation import Relaxation


def lift(
    reduction: Reduction, relaxation: Relaxation, point: Mapping[int, float], early_drops: bool = False
) -> list[int]:
    """The sequence of executions that a point of `relaxation` (column -> value) stands for."""
    order: list[int] = []
    kept = [{v for v, column in columns.items() if point.get(column, 0.0) > 0.5} for columns in relaxation.keep]
    kept.append(set())
    for i, (start, end) in enumerate(zip(relaxation.instants, relaxation.ends, strict=True)):
        present = set(kept[i])
        drops = _drops(reduction, relaxation, point, i, kept) if early_drops else {}
        for j in range(start, end):
            for value in reduction.inputs[j]:
                _provide(reduction, value, present, order)
            order.append(j)
            present.update(reduction.outputs[j])
            present.difference_update(drops.get(j, ()))
        for value in sorted(kept[i + 1], key=lambda v: reduction.graph.values[v].producer):
            _provide(reduction, value, present, order)
    return prune(reduction.graph, order)


def _drops(
    reduction: Reduction, relaxation: Relaxation, point: Mapping[int, float], i: int, kept: Sequence[set[int]]
) -> dict[int, list[int]]:
    """Operator -> values to drop after it: there at first, recomputed in segment i, and unread for the longest time."""
    start, end = relaxation.instants[i], relaxation.ends[i]
    needs: dict[int, list[int]] = {}
    for j in range(start, end):
        for value in reduction.inputs[j]:
            needs.setdefault(value, []).append(j)
    drops: dict[int, list[int]] = {}
    for operator, column in relaxation.rerun[i].items():
        if point.get(column, 0.0) <= 0.5:
            continue
        for value in reduction.outputs[operator]:
            if operator < start and value not in kept[i]:
                continue  # it comes in by the recomputation itself
            times = [max(start, operator), *needs.get(value, ()), *([end] if value in kept[i + 1] else ())]
            gaps = [(later - earlier, earlier) for earlier, later in itertools.pairwise(times)]
            if gaps and max(gaps)[0] > 1:
                drops.setdefault(max(gaps)[1], []).append(value)
    return drops


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
