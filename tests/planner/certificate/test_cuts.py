"""Rounded rows hold for every schedule: random combinations of rows, and the cuts that the maker finds."""

from __future__ import annotations

import random
from itertools import product

import pytest

from planner.certificate.cuts import Cut, CutError, derive, rounded
from planner.certificate.linear import RelaxedProgram
from planner.certificate.relaxation import Column, Relaxation, Row
from solvers.schedule import Schedule
from solvers.simulator import ScheduleError, simulate
from solvers.solution import memory_floor
from tests.planner.certificate.points import point_of, random_order
from tests.planner.certificate.test_relaxation import graph_of
from tests.solvers.brute_force import BruteForce


def holds(row: Row, point: dict[Column, int]) -> bool:
    return sum(a * point.get(column, 0) for column, a in row.terms.items()) >= row.least


def test_rounding_keeps_every_whole_point() -> None:
    """All 0/1 points of random rows, any complement, any divisor."""
    rng = random.Random(0)
    columns: list[Column] = [("k", 0, i) for i in range(5)]
    tightened = 0
    for _ in range(3000):
        row = Row({c: rng.randint(-9, 9) or 1 for c in columns}, rng.randint(-12, 20))
        complement = [c for c in columns if rng.random() < 0.5]
        try:
            cut = rounded(row, complement, rng.randint(1, 10))
        except CutError:
            continue
        for bits in product((0, 1), repeat=len(columns)):
            point = dict(zip(columns, bits, strict=True))
            if holds(row, point):
                assert holds(cut, point), f"{row} {complement} {cut} {point}"
            tightened += holds(row, point) and not holds(cut, point)
    assert tightened == 0


def test_a_knapsack_cover() -> None:
    """3x + 3y + 3z ≥ 4 needs two of the three: divided by 3, x + y + z ≥ 2."""
    columns: list[Column] = [("r", 0, i) for i in range(3)]
    cut = rounded(Row(dict.fromkeys(columns, 3), 4), (), 3)
    assert cut == Row(dict.fromkeys(columns, 1), 2)


def test_random_cuts_hold_for_random_schedules() -> None:
    cuts = 0
    for seed in range(120):
        graph, rng = graph_of(seed, small=False)
        again = Relaxation(graph, 1, (0,), 0).repeatable
        schedule = Schedule.from_order(graph, random_order(graph, rng, again))
        try:
            peak_bytes = simulate(graph, schedule).peak_bytes
        except ScheduleError:
            continue
        instants = tuple(sorted({0, *rng.sample(range(len(graph)), min(2, len(graph)))}))
        relaxation = Relaxation(graph, peak_bytes, instants, 0)
        names = [*relaxation.flow_rows(), *(("memory", j) for j in range(len(graph)))]
        rows = [relaxation.row(name) for name in names]
        point = point_of(relaxation, schedule)
        for _ in range(10):
            combine = tuple((rng.randrange(len(rows)), rng.randint(0, 4)) for _ in range(3))
            columns = tuple(c for i, _ in combine for c in rows[i].terms if rng.random() < 0.5)
            try:
                cut = derive(relaxation, rows, Cut(combine, columns, rng.randint(2, 30)))
            except CutError:
                continue
            cuts += 1
            rows.append(cut)
            assert holds(cut, point), f"seed {seed}"
    assert cuts > 300


def test_the_makers_cuts_hold_for_optimal_schedules() -> None:
    cuts = 0
    for seed in range(60):
        graph, rng = graph_of(seed, small=True)
        peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
        budget_bytes = rng.randint(memory_floor(graph)[0], peak_bytes)
        _, schedule = BruteForce(graph).optimum(budget_bytes)
        if schedule is None:
            continue
        relaxation = Relaxation(graph, budget_bytes, tuple(sorted({0, len(graph) // 2})), 0)
        program = RelaxedProgram(relaxation)
        for _ in range(4):
            answer = program.solve_with_all_rows({}, 10.0)
            if answer.infeasible or not program.add_cuts(answer):
                break
        point = point_of(relaxation, schedule)
        for index in program.cuts:
            cuts += 1
            assert holds(program.rows[index], point), f"seed {seed}"
    assert cuts > 0


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (Cut(((5, 1),), (), 2), "combines row 5 of 1"),
        (Cut(((0, -1),), (), 2), "with weight -1"),
        (Cut(((0, 1),), (), 0), "divides by 0"),
        (Cut(((0, 2),), (), 2), "nothing to round"),
    ],
)
def test_refusals(cut: Cut, message: str) -> None:
    graph, _ = graph_of(3, small=False)
    relaxation = Relaxation(graph, 100, (0,), 0)
    with pytest.raises(CutError, match=message):
        derive(relaxation, [relaxation.row(("memory", 0))], cut)
