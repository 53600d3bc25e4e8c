"""The turn from forward to backward: values that must not be held across it (:attr:`Graph.released`).

Who pins a module to be recomputed forbids its inner values at one instant. Every order of executions can be mended to
obey: what it holds there and must not is recomputed right before its first reader of the backward program, inputs
first. The result is legal and may need more memory or time than the order that came in; whether it fits is for the
simulator. Solvers that know the constraint (:mod:`solvers.snapshot`) need no mending; the orders of all others pass
through here before they are judged, and lower bounds that know nothing of it hold all the same, since a pin only
removes schedules.
"""

from __future__ import annotations

from collections.abc import Sequence

from graph_capture.graph import Graph
from solvers.schedule import outside_loss, programs_of


def released_order(graph: Graph, order: Sequence[int]) -> list[int]:
    """`order` with recomputations in the place of what it holds across the turn and must not; often unchanged."""
    if not graph.released:
        return list(order)
    executions = outside_loss(graph, order)
    turn = programs_of(graph, executions).count("forward")
    if not _wanted_after(graph, executions, turn).intersection(graph.released):
        return executions
    released = set(graph.released)
    mended = executions[:turn]
    remade: set[int] = set()  # operators that ran after the turn
    for index in executions[turn:]:
        for value in graph.operators[index].inputs:
            _provide(graph, released, value, remade, mended)
        mended.append(index)
        remade.add(index)
    return mended


def _wanted_after(graph: Graph, executions: Sequence[int], turn: int) -> set[int]:
    """The values whose instance from before the turn is read after it."""
    wanted: set[int] = set()
    for index in reversed(executions[turn:]):
        wanted.difference_update(graph.operators[index].outputs)
        wanted.update(graph.operators[index].inputs)
    return wanted


def _provide(graph: Graph, released: set[int], value: int, remade: set[int], order: list[int]) -> None:
    """Append the recomputations that a released value needs, inputs first; without recursion, chains are long."""
    stack = [(value, False)]
    while stack:
        wanted, inputs_done = stack.pop()
        producer = graph.values[wanted].producer
        if wanted not in released or producer in remade:
            continue
        if inputs_done:
            order.append(producer)
            remade.add(producer)
        else:
            stack.append((wanted, True))
            stack.extend((v, False) for v in reversed(graph.operators[producer].inputs))
