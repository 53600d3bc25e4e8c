"""The columns that a schedule decides, read off a replay of it; shares no code with the relaxation."""

from __future__ import annotations

import random
from collections.abc import Sequence

from graph_capture.graph import Graph
from planner.certificate.relaxation import Column, Relaxation
from solvers.schedule import Compute, Free, Schedule


def point_of(relaxation: Relaxation, schedule: Schedule) -> dict[Column, int]:
    """k, r and h of a schedule that runs first in captured order, outside of the ranges left away."""
    graph, instants = relaxation.graph, relaxation.instants
    point: dict[Column, int] = {}
    alive: set[int] = set()
    held: set[int] = set()
    done: set[int] = set()
    segment = -1
    for step in schedule.steps:
        if isinstance(step, Free):
            alive.discard(step.value)
            held.discard(step.value)
            continue
        if step.operator not in done and step.operator in instants:
            if segment >= 0:
                point |= {("h", segment, v): 1 for v in held}
            segment += 1
            point |= {("k", segment, v): 1 for v in alive}
            held = set(alive)
        if step.operator in done:
            point["r", segment, step.operator] = 1
        _run(graph, step, alive, held)
        done.add(step.operator)
    return {column: x for column, x in point.items() if relaxation.box(column) != (0, 0)}


def _run(graph: Graph, step: Compute, alive: set[int], held: set[int]) -> None:
    if step.reuses is not None:
        alive.discard(step.reuses)
        held.discard(step.reuses)
    made = graph.operators[step.operator].outputs
    held.difference_update(made)
    alive.update(made)


def random_order(graph: Graph, rng: random.Random, again: Sequence[bool]) -> list[int]:
    """First runs in captured order with repetitions in between: each is legal, because its inputs are made before."""
    order: list[int] = []
    for j in range(len(graph)):
        for _ in range(rng.choice((0, 0, 1, 3))):
            earlier = [o for o in range(j) if again[o]]
            if earlier:
                order.append(rng.choice(earlier))
        order.append(j)
    return order
