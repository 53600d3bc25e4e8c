"""Rotor on graphs: golden orders, the stages of a graph, monotone in the budget, and every plan legal."""

from __future__ import annotations

import random

import pytest

from graph_capture.graph import Graph
from solvers import ChenGreedy, HeterogeneousChain, Status
from solvers.block_options import _Block, block_options
from solvers.chain_cuts import chain_of
from solvers.chain_program import Chain, ChainProgram
from solvers.chain_stages import Stages, coarse_cuts, stage_cuts
from solvers.heterogeneous_chain import NEAREST
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.verdict import judge
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import (
    EVERYTHING,
    PLAIN,
    SHAPES,
    Builder,
    Features,
    forward_graph,
    joint_graph,
    random_graph,
    training_chain,
)

SOLVER = HeterogeneousChain()


def stages_of(n: int) -> Stages:
    graph = training_chain(n)
    cuts = chain_of(graph)
    assert cuts is not None
    return Stages.of(graph, cuts.cuts, cuts.long_lived)


def test_golden_chain_of_a_graph() -> None:
    """Backward k reads what layers k - 1 and k made; that of layer 0 reads only what layer 1 was given as well."""
    assert stages_of(3).backward == ((), (4, 5), (3,))
    assert stages_of(3).chain() == Chain(
        ftime=(1.0, 1.0, 1.0),
        btime=(0, 2.0, 1.0),
        x=(0, 10, 10, 0),
        xbar=(0, 10, 10, 10),
        ftmp=(0, 0, 0),
        btmp=(0, 10, 10),
        delta=(0, 0, 10, 0),
        all_tmp=(0, 0, 0),
    )


def test_golden_orders() -> None:
    """Four layers, forward 0–3, backward 4–7; layer 1 is made again from layer 0, or held while that is made again."""
    stages = stages_of(4)
    program = ChainProgram(stages.chain(), 50)
    plan = program.plan(40)
    assert plan is not None
    assert stages.order(plan) == [0, 1, 2, 3, 4, 5, 0, 1, 6, 7]
    assert stages.order(plan, hold_outputs=True) == [0, 1, 2, 3, 4, 5, 0, 6, 7]
    assert program.plan(30) is None


def test_close_to_the_optimum_on_a_chain() -> None:
    graph = training_chain(6)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    for budget_bytes in (peak_bytes - 10, peak_bytes - 20, peak_bytes - 30):
        solution = SOLVER.solve(graph, budget_bytes)
        optimum = BruteForce(graph).overhead(budget_bytes)
        assert optimum <= solution.overhead + 1e-9
        assert solution.overhead <= optimum + 2 / 12  # two layers of twelve


@pytest.mark.parametrize("n", [25, 100])
def test_a_larger_budget_costs_no_more_and_chen_is_not_better(n: int) -> None:
    graph = training_chain(n)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    previous = float("inf")
    for percent in (8, 10, 20, 30, 50, 70, 90, 100):
        budget_bytes = peak_bytes * percent // 100
        overhead = SOLVER.solve(graph, budget_bytes).overhead
        assert overhead <= previous
        assert overhead <= ChenGreedy().solve(graph, budget_bytes).overhead
        previous = overhead
    assert previous == 0.0


@pytest.mark.parametrize("features", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_every_plan_of_random_graphs_is_legal(features: Features) -> None:
    """`judge` raises if a plan is not; every plan covers every operator within the budget that it is returned for."""
    applied = 0
    for seed in range(120):
        graph = random_graph(seed, 6 + seed % 5, features)
        if SOLVER.applies_to(graph) is not None:
            continue
        applied += 1
        peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
        for budget_bytes in (peak_bytes - 1, peak_bytes * 3 // 4):
            solution = SOLVER.solve(graph, budget_bytes)
            if solution.schedule is not None:
                assert simulate(graph, solution.schedule).peak_bytes <= budget_bytes
    assert applied > 40


def test_coarse_stages() -> None:
    graph = training_chain(40)
    cuts = chain_of(graph)
    assert cuts is not None
    assert coarse_cuts(cuts, 40) == cuts.cuts
    chosen = coarse_cuts(cuts, 7)
    assert len(chosen) == 6
    assert set(chosen) <= set(cuts.cuts)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    coarse = HeterogeneousChain(max_stages=7, units=50).solve(graph, peak_bytes // 2)
    assert coarse.schedule is not None
    assert coarse.overhead >= SOLVER.solve(graph, peak_bytes // 2).overhead


def test_does_not_apply() -> None:
    forward_only = forward_graph(SHAPES["chain"](random.Random(0), 5), random.Random(0))
    assert SOLVER.solve(forward_only, 1).status is Status.NOT_APPLICABLE
    fork = joint_graph([(), (), (0, 1), (0, 2), (1, 3)], random.Random(0))
    solution = SOLVER.solve(fork, 1)
    if chain_of(fork) is None:
        assert solution.status is Status.NOT_APPLICABLE
        assert "nothing cuts the forward graph" in solution.message


def blocks(n: int) -> Graph:
    """`n` equal blocks: a dear operator, a cheap one with a larger output, and a small boundary that is added to it."""
    builder = Builder()
    made: list[tuple[int, int, int]] = []
    boundary: list[int] = builder.add("forward", [], [4], 1.0)
    for _ in range(n):
        dear = builder.add("forward", boundary, [10], 20.0)
        cheap = builder.add("forward", dear, [16], 1.0)
        made.append((boundary[0], dear[0], cheap[0]))
        boundary = builder.add("forward", [*cheap, *boundary], [4], 2.0)  # a residual: no cut inside of the block
    gradient = builder.add("backward", boundary, [4], 1.0)
    for start, dear_value, cheap_value in reversed(made):
        gradient = builder.add("backward", [*gradient, cheap_value], [16], 3.0)
        gradient = builder.add("backward", [*gradient, dear_value], [10], 1.0)
        gradient = builder.add("backward", [*gradient, start], [4], 30.0)
    return builder.graph()


def stages_of_blocks(n: int) -> tuple[Graph, Stages]:
    graph = blocks(n)
    return graph, Stages.of(graph, tuple(range(0, 3 * n, 3)), frozenset())


def test_golden_options_of_a_block() -> None:
    """The cheap output goes first, at 1 second for 16 bytes; then the dear one, at 20 for 10."""
    graph, stages = stages_of_blocks(4)
    options = block_options(stages, levels=6)
    assert [len(row) for row in options[:4]] == [0, 2, 2, 2]
    boundary, dear, cheap = graph.operators[4].inputs[0], graph.operators[4].outputs[0], graph.operators[5].outputs[0]
    smaller, smallest = options[2]
    assert stages.saved[2] - {boundary} == {dear, cheap}
    assert smaller.kept == stages.saved[2] - {cheap}
    assert smallest.kept == stages.saved[2] - {cheap, dear}
    assert [o.size.xbar for o in options[2]] == [14, 4]
    assert [o.size.btime for o in options[2]] == [34.0 + 1.0, 34.0 + 21.0]
    first = stages.backward[2][0]
    assert smaller.backward == (5, first, first + 1, first + 2)
    assert smallest.backward == (4, 5, first, first + 1, first + 2)


def test_options_pay_where_a_block_has_a_cheap_part() -> None:
    """To drop the cheap outputs alone halves the memory for 1 second a block; the paper's program has 23 to pay."""
    graph = blocks(8)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    budget_bytes = peak_bytes * 6 // 10
    without, with_them = (HeterogeneousChain(options=o).solve(graph, budget_bytes).overhead for o in (0, 6))
    assert with_them * graph.step_seconds <= 7.0
    assert without * graph.step_seconds >= 60.0


def test_equal_blocks_are_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []
    descent = _Block.descent

    def counted(block: _Block) -> list[frozenset[int]]:
        solved.append(block.stage)
        return descent(block)

    monkeypatch.setattr(_Block, "descent", counted)
    _, stages = stages_of_blocks(30)
    options = block_options(stages, levels=6)
    assert len(solved) <= 4  # the first, the last, and one of those between
    assert len({tuple(o.size for o in row) for row in options[1:-1]}) == 1


@pytest.mark.parametrize("features", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_options_are_never_worse(features: Features) -> None:
    better = 0
    for seed in range(60):
        graph = random_graph(seed, 6 + seed % 5, features)
        if SOLVER.applies_to(graph) is not None:
            continue
        peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
        for percent in (90, 75, 60):
            budget_bytes = peak_bytes * percent // 100
            without, with_them = (HeterogeneousChain(options=o).solve(graph, budget_bytes).overhead for o in (0, 6))
            assert with_them <= without
            better += with_them < without
    assert better > 2


def plain_descent(block: _Block) -> list[frozenset[int]]:
    """What `descent` promises, from the whole of what runs again after each drop."""

    def price(kept: frozenset[int]) -> float:
        return sum(block.graph.operators[i].seconds for i in block._again(kept))

    kept, steps = block.saved, list[frozenset[int]]()
    while True:
        drops: list[tuple[float, int, frozenset[int]]] = []
        for maker in {block.graph.values[v].producer for v in kept - block.fixed}:
            fewer = kept - (frozenset(block.graph.operators[maker].outputs) - block.fixed)
            if freed := block.size_of(kept) - block.size_of(fewer):
                drops.append(((price(fewer) - price(kept)) / freed, maker, fewer))
        if not drops:
            return steps
        least = min(rate for rate, _, _ in drops)
        kept = next(fewer for rate, _, fewer in sorted(drops, key=lambda d: d[1]) if rate <= least + 1e-9)
        steps.append(kept)


@pytest.mark.parametrize("features", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_each_drop_is_the_cheapest_per_byte(features: Features) -> None:
    drops = 0
    for seed in range(80):
        graph = random_graph(seed, 8 + seed % 9, features)
        cuts = chain_of(graph)
        if cuts is None:
            continue
        stages = Stages.of(graph, coarse_cuts(cuts, 3), cuts.long_lived)
        for stage in range(len(stages.forward)):
            block = _Block(stages, stage)
            drops += len(steps := block.descent())
            assert steps == plain_descent(block)
    assert drops > 100


@pytest.mark.parametrize("graph", [training_chain(30), blocks(12)], ids=["chain", "blocks"])
@pytest.mark.parametrize("percent", [80, 60, 50])
def test_nearest_orders_are_close_to_the_best(graph: Graph, percent: int) -> None:
    """A handful of them, around the budget, has what judging every plan of two tables finds, or nearly so."""
    budget_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes * percent // 100
    solver = HeterogeneousChain(units=budget_bytes)
    orders = list(solver.orders_nearest(graph, budget_bytes))
    judged = [judge(graph, Schedule.from_order(graph, order)) for order in orders]
    assert len(orders) <= 4 * NEAREST
    assert any(candidate.peak_bytes > budget_bytes for candidate in judged)
    fitting = [candidate.overhead for candidate in judged if candidate.peak_bytes <= budget_bytes]
    assert min(fitting) <= solver.solve(graph, budget_bytes).overhead + 0.005


def test_stages_are_few_before_they_are_coarse() -> None:
    """Cuts over which nothing new passes make no stage; where the others are few enough, all of them are used."""
    builder = Builder()
    passed: list[int] = []
    for _ in range(6):  # a residual block with two branches of negligible size: cuts, but what it was given passes them
        inner = builder.add("forward", passed, [1], 1.0)
        inner = builder.add("forward", inner, [1], 1.0)
        passed = builder.add("forward", [*passed, *inner], [100_000], 1.0)
    builder.add("backward", passed, [10], 1.0)
    graph = builder.graph()
    cuts = chain_of(graph)
    assert cuts is not None
    fresh = stage_cuts(graph, cuts, len(graph))
    assert set(fresh) < set(cuts.cuts)
    assert stage_cuts(graph, cuts, len(fresh) + 1) == fresh
    assert len(stage_cuts(graph, cuts, len(fresh))) < len(fresh)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="options is -1; it must not be negative"):
        HeterogeneousChain(options=-1)
    with pytest.raises(ValueError, match="units is 0; it must be at least 1"):
        HeterogeneousChain(units=0)
