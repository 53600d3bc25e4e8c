"""Rotor on graphs: golden orders, the stages of a graph, monotone in the budget, and every plan legal."""

from __future__ import annotations

import random

import pytest

from graph_capture.graph import Graph
from solvers import ChenGreedy, HeterogeneousChain, Status
from solvers.block_options import _Block, block_options
from solvers.chain_cuts import chain_of
from solvers.chain_program import Chain, ChainProgram
from solvers.chain_stages import Stages, coarse_cuts
from solvers.schedule import Schedule
from solvers.simulator import simulate
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


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="options is -1; it must not be negative"):
        HeterogeneousChain(options=-1)
    with pytest.raises(ValueError, match="units is 0; it must be at least 1"):
        HeterogeneousChain(units=0)
