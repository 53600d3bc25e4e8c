"""The certificate's interpreter against the simulator: the same peaks, seconds and refusals."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from graph_capture.graph import Graph
from planner.certificate.relaxation import Relaxation
from planner.certificate.replay import ScheduleRow, replay
from planner.errors import CertificateError
from solvers.schedule import Schedule
from solvers.simulator import ScheduleError, simulate
from tests.planner.certificate.points import random_order
from tests.planner.certificate.test_relaxation import graph_of
from tests.solvers.random_graphs import training_chain


def rows_of(schedule: Schedule) -> tuple[ScheduleRow, ...]:
    return tuple(row if isinstance(row, int) else (row[0], row[1]) for row in schedule.to_list())


def assert_same(graph: Graph, schedule: Schedule) -> bool:
    try:
        simulation = simulate(graph, schedule)
    except (ScheduleError, KeyError):
        with pytest.raises((CertificateError, KeyError)):
            replay(graph, rows_of(schedule))
        return False
    replayed = replay(graph, rows_of(schedule))
    assert replayed.first_peak_bytes == simulation.first_peak_bytes
    assert replayed.later_peak_bytes == simulation.later_peak_bytes
    assert replayed.recomputed_seconds == Fraction(simulation.recomputed_seconds)  # prices are small integers
    return True


def test_agrees_with_the_simulator() -> None:
    """Random schedules, and the same ones damaged: a step left out, doubled, or two exchanged."""
    verdicts: list[bool] = []
    for seed in range(400):
        graph, rng = graph_of(seed, small=False)
        again = Relaxation(graph, 1, (0,), 0).repeatable
        schedule = Schedule.from_order(graph, random_order(graph, rng, again))
        verdicts += [assert_same(graph, schedule), assert_same(graph, damaged(schedule, rng))]
    assert verdicts.count(True) > 330
    assert verdicts.count(False) > 200


def damaged(schedule: Schedule, rng: random.Random) -> Schedule:
    steps = list(schedule.steps)
    at = rng.randrange(len(steps))
    kind = rng.choice(("drop", "double", "swap"))
    if kind == "drop":
        del steps[at]
    elif kind == "double":
        steps.insert(rng.randrange(len(steps)), steps[at])
    else:
        other = rng.randrange(len(steps))
        steps[at], steps[other] = steps[other], steps[at]
    return Schedule(tuple(steps))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((0, 1, 2, 3, 4, 5), "never runs operator 6"),
        ((8,), "runs operator 8 of 8"),
        ((0, -1, 1), "reads value 0, which is not in memory"),
        ((0, 0), "makes value 0, which is still in memory"),
        ((-3,), "frees value 2, which is not in memory"),
        ((0, (1, 0)), "takes over value 0, which it cannot"),
    ],
)
def test_refusals(rows: tuple[ScheduleRow, ...], message: str) -> None:
    with pytest.raises(CertificateError, match=message):
        replay(training_chain(4), rows)
