"""Which values a schedule has in memory: at one execution, at the end of the forward program, and from when to when."""

from __future__ import annotations

from dataclasses import dataclass

from graph_capture.graph import Graph
from solvers.schedule import Compute, Schedule, programs_of


@dataclass(frozen=True)
class Lifetime:
    """One stay of a value in memory: from execution `first` to execution `last`, both included."""

    value: int
    first: int
    last: int


def alive_after_forward(graph: Graph, schedule: Schedule) -> set[int]:
    """Activations of the forward phase that are in memory when the forward program ends."""
    forward_executions = programs_of(graph, schedule.order).count("forward")
    alive: set[int] = set()
    position = 0
    for step in schedule.steps:
        if isinstance(step, Compute):
            if position == forward_executions:
                break
            if step.reuses is not None:
                alive.discard(step.reuses)
            alive.update(graph.operators[step.operator].outputs)
            position += 1
        else:
            alive.discard(step.value)
    return {v for v in alive if graph.values[v].kind == "activation"}


def alive_at(graph: Graph, schedule: Schedule, position: int, *, later: bool) -> set[int]:
    """Values in memory while execution `position` runs, its inputs and outputs included."""
    stays = lifetimes(graph, schedule, later=later, until=position)
    return {life.value for life in stays if life.first <= position <= life.last}


def lifetimes(graph: Graph, schedule: Schedule, *, later: bool, until: int | None = None) -> list[Lifetime]:
    """Every stay of every value, in the order in which they end.

    **Arguments:**

    - `until`: the last execution to look at; what is in memory there is said to end there.

    - `later`: of a later micro-batch, in which a gradient goes as soon as it has been added to `.grad`, unless it is
      read again; in a first one it stays.
    """
    last_read = {v: p for p, index in enumerate(schedule.order) for v in graph.operators[index].inputs}
    delivered: dict[int, list[int]] = {}
    for index, value in enumerate(graph.values):
        if later and value.kind == "gradient" and value.delivered_after is not None:
            delivered.setdefault(value.delivered_after, []).append(index)
    born: dict[int, int] = {}
    stays: list[Lifetime] = []
    executed = -1

    def end(value: int, last: int) -> None:
        first = born.pop(value, None)
        if first is not None:
            stays.append(Lifetime(value, first, last))

    for step in schedule.steps:
        if not isinstance(step, Compute):
            end(step.value, executed)
            continue
        if executed == until:
            break
        executed += 1
        if step.reuses is not None:
            end(step.reuses, executed - 1)
        for value in graph.operators[step.operator].outputs:
            born.setdefault(value, executed)
        for value in delivered.pop(step.operator, ()):
            end(value, max(executed, last_read.get(value, executed)))
    for value in list(born):
        end(value, executed)
    return stays
