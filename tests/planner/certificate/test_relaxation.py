"""Every row of the relaxation holds for every schedule of the class: optimal ones, and random ones."""

from __future__ import annotations

import random

import pytest

from graph_capture.graph import Graph
from planner.certificate.relaxation import Relaxation, UnknownRowError
from solvers.schedule import Schedule
from solvers.simulator import ScheduleError, simulate
from solvers.solution import memory_floor
from tests.planner.certificate.points import point_of, random_order
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import EVERYTHING, PLAIN, Features, random_graph, training_chain

IN_PLACE = Features(in_place=0.7, several_outputs=0.2, zero_bytes=0.1)
SCRATCH = Features(workspace=0.5, gradients=0.6, late_delivery=0.5, delivery_copy=0.5, gradient_reads=0.3)
ONCE = Features(not_recomputable=0.3, several_outputs=0.4, outputs=0.1, loss=True, in_place=0.3)
LATER = Features(gradients=0.7, gradient_accumulation=True, resident_bytes=5, in_place=0.3)
FAMILIES = [(f, joint) for f in (PLAIN, IN_PLACE, SCRATCH, ONCE, LATER, EVERYTHING) for joint in (True, False)]


def graph_of(seed: int, small: bool) -> tuple[Graph, random.Random]:
    rng = random.Random(seed)
    features, joint = rng.choice(FAMILIES)
    n = (rng.randint(3, 4) if joint else rng.randint(5, 7)) if small else rng.randint(4, 9)
    return random_graph(seed, n, features, joint), rng


def relaxations(graph: Graph, budget_bytes: int, rng: random.Random) -> list[Relaxation]:
    n = len(graph)
    some = tuple(sorted({0, *rng.sample(range(n), min(3, n))}))
    return [Relaxation(graph, budget_bytes, instants, rng.choice((0, 3))) for instants in (some, tuple(range(n)))]


def assert_all_rows_hold(relaxation: Relaxation, schedule: Schedule, where: str) -> None:
    point = point_of(relaxation, schedule)
    for column in point:
        assert relaxation.box(column)[1] == 1, where
    names = [*relaxation.flow_rows(), *(("memory", j) for j in range(len(relaxation.graph)))]
    columns = {c for name in names for c in relaxation.row(name).terms}
    for column in columns:
        low, high = relaxation.box(column)
        assert low <= point.get(column, 0) <= high, f"{where}: {column}"
    for name in names:
        row = relaxation.row(name)
        assert sum(a * point.get(c, 0) for c, a in row.terms.items()) >= row.least, f"{where}: {name}"
    seconds = relaxation.graph.operators
    recomputed = sum(seconds[o].seconds for kind, _, o in point if kind == "r")
    assert recomputed <= simulate(relaxation.graph, schedule).recomputed_seconds + 1e-9, where


@pytest.mark.parametrize("block", range(6))
def test_rows_hold_for_optimal_schedules(block: int) -> None:
    for seed in range(12 * block, 12 * block + 12):
        graph, rng = graph_of(seed, small=True)
        peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
        for budget_bytes in (rng.randint(memory_floor(graph)[0], peak_bytes), rng.randint(peak_bytes // 2, peak_bytes)):
            _, schedule = BruteForce(graph).optimum(budget_bytes)
            if schedule is not None:
                for relaxation in relaxations(graph, budget_bytes, rng):
                    assert_all_rows_hold(relaxation, schedule, f"seed {seed}, budget {budget_bytes}")


@pytest.mark.parametrize("block", range(5))
def test_rows_hold_for_random_schedules(block: int) -> None:
    legal = 0
    for seed in range(100 * block, 100 * block + 100):
        graph, rng = graph_of(seed, small=False)
        again = Relaxation(graph, 1, (0,), 0).repeatable
        schedule = Schedule.from_order(graph, random_order(graph, rng, again))
        try:
            peak_bytes = simulate(graph, schedule).peak_bytes
        except ScheduleError:  # a released gradient, or a recomputation inside of the loss
            continue
        legal += 1
        for relaxation in relaxations(graph, peak_bytes, rng):
            assert_all_rows_hold(relaxation, schedule, f"seed {seed}")
    assert legal > 50


def test_rows_are_tight_where_nothing_is_recomputed() -> None:
    """With every operator an instant, store-all fills some memory row to the last byte, and one byte less breaks it."""
    for seed in range(40):
        graph = random_graph(seed, 5, PLAIN)
        schedule = Schedule.store_all(graph)
        peak_bytes = simulate(graph, schedule).peak_bytes
        relaxation = Relaxation(graph, peak_bytes, tuple(range(len(graph))), 0)
        point = point_of(relaxation, schedule)
        rows = [relaxation.row(("memory", j)) for j in range(len(graph))]
        slack = [sum(a * point.get(c, 0) for c, a in row.terms.items()) - row.least for row in rows]
        assert min(slack) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (("nothing", 0, 1), "not the name of a row"),
        (("need", 0), "not the name of a row"),
        (("memory", 99), "no such operator"),
        (("need", 7, 1), "no such segment or value"),
        (("need", 0, 1), "made after the segment's instant"),
        (("need", 1, 1), "nothing in the segment reads the value"),
        (("rerun", 1, 4, 0), "no such operator reads the value"),
        (("carry", 1, 1), "the last segment has none"),
    ],
)
def test_unknown_rows(name: tuple[str | int, ...], message: str) -> None:
    relaxation = Relaxation(training_chain(4), 100, (0, 7), 0)
    with pytest.raises(UnknownRowError, match=message):
        relaxation.row(name)


@pytest.mark.parametrize("instants", [(), (1,), (0, 0), (0, 3, 2), (0, 8)])
def test_instants_are_checked(instants: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not operators in ascending order"):
        Relaxation(training_chain(4), 100, instants, 0)
