"""Every legal schedule of the ordered class satisfies every row of the relaxation: the reason why its bound is one."""

from __future__ import annotations

import dataclasses
import random

import pytest

from graph_capture.graph import Graph
from solvers.schedule import Schedule, outside_loss
from solvers.simulator import simulate
from solvers.snapshot.lift import prune
from solvers.snapshot.project import project
from solvers.snapshot.reduction import can_repeat, reduce
from solvers.snapshot.relaxation import PERCENT, Relaxation, build
from tests.solvers.random_graphs import EVERYTHING, PLAIN, random_graph

TOLERANCE = 1e-9


def random_order(graph: Graph, rng: random.Random, density: float) -> list[int]:
    """Captured order with legal recomputations strewn in, those that nobody reads taken out again."""
    repeatable = can_repeat(graph)
    order: list[int] = []
    for index in range(len(graph)):
        order += [o for o in range(index) if repeatable[o] and rng.random() < density]
        order.append(index)
    return prune(graph, outside_loss(graph, order))


def broken_row(relaxation: Relaxation, point: dict[int, float]) -> int | None:
    """A row or, as its negative, a column bound that the point does not keep; `None` if it keeps all."""
    program = relaxation.program
    activity = [0.0] * len(program.row_lower)
    for row, column, coefficient in zip(program.row_ids, program.column_ids, program.coefficients, strict=True):
        activity[row] += coefficient * point.get(column, 0.0)
    for row, value in enumerate(activity):
        if not program.row_lower[row] - TOLERANCE <= value <= program.row_upper[row] + TOLERANCE:
            return row
    for column, lower in enumerate(program.lower):
        if not lower <= point.get(column, 0.0) <= program.upper[column]:
            return -1 - column
    return None


@pytest.mark.parametrize("block", range(10))
def test_schedules_satisfy_every_row(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        rng = random.Random(seed)
        features = EVERYTHING if rng.random() < 0.5 else PLAIN
        joint = rng.random() < 0.6
        size = rng.randint(2, 12) if joint else rng.randint(3, 30)
        graph = random_graph(seed, size, features, joint)
        order = random_order(graph, rng, rng.choice((0.02, 0.1, 0.4)))
        simulation = simulate(graph, Schedule.from_order(graph, order))
        # the two exchanges move schedules about: without them each schedule must be there as it is
        reduction = dataclasses.replace(reduce(graph, simulation.peak_bytes), superseded={}, eliminated={})
        instants = rng.sample(range(len(graph)), rng.randint(1, len(graph)))
        bursts = rng.sample(range(len(graph)), rng.randint(0, len(graph)))
        relaxation = build(reduction, max(1, simulation.peak_bytes), instants, None, bursts=bursts)
        point = project(reduction, relaxation, order)
        assert broken_row(relaxation, point) is None, f"seed {seed}"
        recomputed = sum(relaxation.program.costs[column] * value for column, value in point.items())
        assert recomputed <= PERCENT * simulation.recomputed_seconds / (graph.step_seconds or 1.0) + TOLERANCE
