"""The lower bound of snapshot refinement against the exact optimum of the ordered class, on tiny graphs."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator

import pytest

from graph_capture.graph import Graph, Operator, Value
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.snapshot.engine import Answer, EnginePool, Limits, Outcome
from solvers.snapshot.reduction import reduce
from solvers.snapshot.relaxation import PERCENT, build
from solvers.snapshot.search import BOUND_MARGIN_PERCENT
from solvers.snapshot.windows import MOST_ROWS
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import EVERYTHING, PLAIN, Features, random_graph, training_chain

IN_PLACE = Features(in_place=0.6, several_outputs=0.2, zero_bytes=0.1)
SCRATCH = Features(workspace=0.5, gradients=0.6, late_delivery=0.5, delivery_copy=0.5, gradient_reads=0.3)
ONCE = Features(not_recomputable=0.3, several_outputs=0.4, outputs=0.1, loss=True)
LATER = Features(gradients=0.7, gradient_accumulation=True, resident_bytes=5, in_place=0.3)
FAMILIES = [(f, joint) for f in (PLAIN, IN_PLACE, SCRATCH, ONCE, LATER, EVERYTHING) for joint in (True, False)]

TIGHT = Limits(time_limit_seconds=20.0, relative_gap=0.0, absolute_gap=1e-9)


@pytest.fixture(scope="module")
def pool() -> Iterator[EnginePool]:
    with EnginePool() as engines:
        yield engines


def bound(
    pool: EnginePool,
    graph: Graph,
    budget_bytes: int,
    instants: set[int],
    rows: set[int] | None,
    bursts: Collection[int] = (),
) -> Answer:
    peak = simulate(graph, Schedule.store_all(graph)).peak_bytes
    relaxation = build(reduce(graph, peak), budget_bytes, instants, rows, bursts=bursts)
    return pool.solve(relaxation.program.serialized(), TIGHT)


@pytest.mark.parametrize("block", range(20))
def test_bound_is_below_the_optimum(pool: EnginePool, block: int) -> None:
    """At random instants and rows, and at all of them, with bursts and without; infeasible only if nothing fits."""
    for seed in range(20 * block, 20 * block + 20):
        rng = random.Random(seed)
        features, joint = rng.choice(FAMILIES)
        graph = random_graph(seed, rng.randint(3, 4) if joint else rng.randint(6, 8), features, joint)
        exact = BruteForce(graph)
        peak = simulate(graph, Schedule.store_all(graph)).peak_bytes
        for _ in range(3):
            budget = rng.randint(peak // 2, peak)
            optimum = exact.overhead(budget) * PERCENT
            n = len(graph)
            some = set(rng.sample(range(n), rng.randint(1, min(4, n))))
            for instants, rows, bursts in ((some, None, ()), (some, set(), range(n)), (set(range(n)), None, range(n))):
                answer = bound(pool, graph, budget, instants, rows, bursts)
                where = f"seed {seed}, budget {budget}, instants {sorted(instants)}, optimum {optimum}"
                if answer.outcome is Outcome.INFEASIBLE:
                    assert math.isinf(optimum), where
                else:
                    assert answer.outcome is Outcome.OPTIMAL, where
                    assert answer.dual_bound - BOUND_MARGIN_PERCENT <= optimum, where


def test_a_value_with_a_partner_is_not_eliminated(pool: EnginePool) -> None:
    """v and z make w; w cannot be kept past operator 5, nor y and z past 7: v must be remade *before* it is used.

    To demand that v be remade where its consumer is remade (the single-input exchange) would claim 12 instead of 7.
    """
    rows: list[tuple[tuple[int, ...], int, float]] = [
        ((), 1, 1.0),  # x
        ((0,), 10, 100.0),  # y
        ((0,), 10, 5.0),  # z
        ((1,), 2, 1.0),  # v
        ((3, 2), 2, 1.0),  # w
        ((0,), 19, 1.0),  # room for x and y only
        ((1,), 0, 1.0),
        ((6,), 27, 1.0),  # room for x and v only
        ((4, 2, 0), 0, 1.0),
    ]
    operators = tuple(
        Operator(f"o{i}", "op", "forward", inputs, (i,), seconds) for i, (inputs, _, seconds) in enumerate(rows)
    )
    graph = Graph(operators, tuple(Value(size, i) for i, (_, size, _) in enumerate(rows)))
    assert BruteForce(graph).optimum_seconds(30) == 7.0
    answer = bound(pool, graph, 30, {0, 5, 7}, None)
    assert answer.dual_bound == pytest.approx(7.0 / graph.step_seconds * PERCENT, abs=1e-3)


def test_windows_tighten_the_linear_relaxation(pool: EnginePool) -> None:
    """A chain of 12 layers that has room for two: 14 of 24 operators run again, and without windows 8 seem enough."""
    graph = training_chain(12)
    peak = simulate(graph, Schedule.store_all(graph)).peak_bytes
    bounds: list[float] = []
    for rows in (0, MOST_ROWS):
        relaxation = build(reduce(graph, peak), 50, set(range(12, 24)), None, window_rows=rows)
        assert bool(relaxation.windows) == (rows > 0)
        relaxation.program.integer = [False] * len(relaxation.program.integer)
        bounds.append(pool.solve(relaxation.program.serialized(), TIGHT).dual_bound)
    assert bounds[0] == pytest.approx(100 / 3, abs=1e-3)
    assert 50.0 < bounds[1] <= 100 * 14 / 24


def test_rows_in_bursts_reach_an_optimum_that_instants_do_not(pool: EnginePool) -> None:
    """Six operators, each an instant: what must go so that one can be recomputed costs more than it seems to."""
    rng = random.Random(73)
    features, joint = rng.choice(FAMILIES)
    graph = random_graph(73, rng.randint(3, 4) if joint else rng.randint(6, 8), features, joint)
    optimum = BruteForce(graph).overhead(34) * PERCENT
    instants = set(range(len(graph)))
    without = bound(pool, graph, 34, instants, None).dual_bound
    assert without < 0.8 * optimum
    assert bound(pool, graph, 34, instants, None, range(len(graph))).dual_bound == pytest.approx(optimum, abs=1e-3)
