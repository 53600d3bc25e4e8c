"""Which orders of first executions are legal: what a training step demands beyond "inputs before outputs".

An operator's first run may move as long as nobody can tell:

* it stays behind the operators whose values it reads;
* the phases follow one another, and the operators of the loss, which the caller runs, keep their order;
* operators that draw random numbers keep their mutual order: each takes the next numbers of the generator;
* operators that must not run twice (they change a buffer, or read one that the step changes) keep theirs;
* so do the operators after which gradients are delivered: autograd, hooks and data-parallel buckets see the order in
  which gradients arrive. What makes a gradient, or reads it before its delivery, stays before it.

Recomputations are free: a repeatable operator may run again anywhere after its first run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from graph_capture.graph import Graph

if TYPE_CHECKING:
    import networkx


def precedence(graph: Graph) -> networkx.DiGraph[int]:
    """A directed graph over operator indices whose topological orders are the legal orders of first executions."""
    import networkx

    result: networkx.DiGraph[int] = networkx.DiGraph()
    result.add_nodes_from(range(len(graph)))
    result.add_edges_from(kept_orders(graph))
    result.add_edges_from(_phase_orders(graph, result))
    return result


def first_runs(order: Iterable[int]) -> list[int]:
    """The operators of a sequence of executions in the order of their first runs."""
    return list(dict.fromkeys(order))


def violation(graph: Graph, order: Iterable[int]) -> str | None:
    """Why the first executions of a sequence are not in a legal order; `None` if they are."""
    place = {operator: position for position, operator in enumerate(first_runs(order))}
    missing = next((i for i in range(len(graph)) if i not in place), None)
    if missing is not None or len(place) != len(graph):
        return f"operator {missing} never runs" if missing is not None else "it runs an operator that there is not"
    names = [o.name for o in graph.operators]
    for earlier, later in precedence(graph).edges:
        if place[earlier] > place[later]:
            return f"operator {later} ({names[later]}) must not run before operator {earlier} ({names[earlier]})"
    return None


def kept_orders(graph: Graph) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) that every legal order keeps, the order of the phases left aside."""
    operators = graph.operators
    for index in range(len(graph)):
        yield from ((producer, index) for producer in graph.producers(index))
    deliveries = {v.delivered_after for v in graph.values if v.delivered_after is not None}
    chains: Sequence[Iterable[int]] = (
        (i for i, o in enumerate(operators) if o.phase == "loss"),
        (i for i, o in enumerate(operators) if o.random_state_bytes),
        (i for i, o in enumerate(operators) if not o.recomputable),
        sorted(deliveries),
    )
    for chain in chains:
        yield from itertools.pairwise(chain)
    for v, value in enumerate(graph.values):
        if value.delivered_after is not None:
            before = {value.producer, *(u for u in graph.uses[v] if u < value.delivered_after)}
            yield from ((operator, value.delivered_after) for operator in before if operator != value.delivered_after)
    backward = [i for i, o in enumerate(operators) if o.phase == "backward"]
    if backward and operators[backward[0] - 1].phase == "loss":
        # gradients that the loss itself makes are handed over after the first operator of the backward
        yield from ((backward[0], other) for other in backward[1:])


def _phase_orders(graph: Graph, inside: networkx.DiGraph[int]) -> Iterator[tuple[int, int]]:
    """Edges from the last operators of each phase to the first ones of the next; `inside` holds all other edges."""
    phases = [[i for i, o in enumerate(graph.operators) if o.phase == p] for p in ("forward", "loss", "backward")]
    for earlier, later in itertools.pairwise([members for members in phases if members]):
        before, after = set(earlier), set(later)
        ends = [i for i in earlier if before.isdisjoint(inside.successors(i))]
        starts = [i for i in later if after.isdisjoint(inside.predecessors(i))]
        yield from itertools.product(ends, starts)
