"""What PyTorch's memory budget does, as schedules to compare with: `activation_memory_budget` of its partitioner.

The partitioner decides what is saved (:mod:`graph_capture.partitions`). Here the rest is computed again where the
backward pass first reads it, depth first, once, as PyTorch's backward graph does after it is ordered like autograd's.
What our planner never recomputes stays (what is returned to the caller, PyTorch at times makes again); equal operators
that PyTorch merges are made again one by one.

These are schedules of our own graph, judged by our simulator, not runs of PyTorch's code.
"""

from __future__ import annotations

from collections.abc import Collection

from graph_capture.graph import Graph
from graph_capture.partitions import SavedOutputs
from solvers.schedule import Schedule

RATIOS = (0.1, 0.25, 0.5, 0.75)
"""The memory budgets that are shown beside a curve."""


def by_partitioner(graph: Graph, saved: SavedOutputs) -> Schedule:
    """The schedule that keeps the saved values for the backward pass, and recomputes the others just in time."""
    kept = {graph.operators[operator].outputs[place] for operator, place in saved}
    return just_in_time(graph, kept)


def just_in_time(graph: Graph, kept: Collection[int]) -> Schedule:
    """Whatever of the forward is not in `kept` and can be, is recomputed before its first use in the backward."""
    present = {v for v, value in enumerate(graph.values) if v in kept or _stays(graph, value.producer)}
    order: list[int] = []
    for index, operator in enumerate(graph.operators):
        if operator.phase == "backward":
            for needed in _missing(graph, operator.inputs, present):
                order.append(needed)
                present.update(graph.operators[needed].outputs)
        order.append(index)
    return Schedule.from_order(graph, order)


def _stays(graph: Graph, producer: int) -> bool:
    operator = graph.operators[producer]
    return operator.phase != "forward" or not operator.recomputable


def _missing(graph: Graph, values: Collection[int], present: Collection[int]) -> list[int]:
    """The operators that make the absent ones of `values`, each after what it reads."""
    found: dict[int, None] = {}
    stack = [(graph.values[v].producer, False) for v in reversed(list(values)) if v not in present]
    while stack:
        operator, ready = stack.pop()
        if operator in found:
            continue
        if ready:
            found[operator] = None
            continue
        stack.append((operator, True))
        inputs = graph.operators[operator].inputs
        stack += [(graph.values[v].producer, False) for v in reversed(inputs) if v not in present]
    return list(found)
