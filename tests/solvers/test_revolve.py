"""Revolve on graphs: golden orders, the closed form on chains, and memory that grows with the logarithm."""

from __future__ import annotations

import random

import pytest

from graph_capture.graph import Graph
from solvers.binomial import extra_steps
from solvers.chain_cuts import chain_of
from solvers.revolve import ChainSteps, Revolve
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.solution import SearchClass, Status
from tests.solvers.random_graphs import (
    EVERYTHING,
    SHAPES,
    Builder,
    forward_graph,
    joint_graph,
    random_graph,
    training_chain,
)


def steps_of(graph: Graph) -> ChainSteps:
    chain = chain_of(graph)
    assert chain is not None
    return ChainSteps.of(graph, chain)


def peak_of(graph: Graph) -> int:
    return simulate(graph, Schedule.store_all(graph)).peak_bytes


def test_golden_order_of_a_chain() -> None:
    # Layers 0-5 forward, 6-11 backward (6 belongs to layer 5, and reads the outputs of layers 4 and 5). Two slots: the
    # starts of layers 0 and 3. Backward 7 wants the start of layer 4, one layer behind 3; backward 9 that of layer 2,
    # on the way to which the start of layer 1 takes the slot that 3 has left.
    assert steps_of(training_chain(6)).order(2) == [0, 1, 2, 3, 4, 5, 6, 3, 7, 8, 0, 1, 9, 10, 11]


@pytest.mark.parametrize("n", [3, 6, 30, 100, 300])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 10, 20])
def test_the_closed_form_on_chains(n: int, slots: int) -> None:
    """What runs again is what the closed form has beyond the forward phase: the record of a layer is its output."""
    graph = training_chain(n)
    simulation = simulate(graph, Schedule.from_order(graph, steps_of(graph).order(slots)))
    assert simulation.recomputed_seconds == extra_steps(n, slots) - (n - 1)
    assert simulation.peak_bytes <= 10 * (min(slots, n - 1) + 3)


def test_memory_far_below_the_square_root() -> None:
    graph = training_chain(1000)
    budget_bytes = 10 * 13  # ten slots; the square root is 31
    solution = Revolve().solve(graph, budget_bytes)
    assert solution.status is Status.FEASIBLE
    assert solution.search_class is SearchClass.ORDERED
    assert solution.overhead == pytest.approx((extra_steps(1000, 10) - 999) / 2000)


def test_a_step_does_not_run_more_often_than_allowed() -> None:
    graph = training_chain(40)
    for most in (1, 2, 4):
        for budget_bytes in range(40, peak_of(graph), 20):
            schedule = Revolve(most_repetitions=most).solve(graph, budget_bytes).schedule
            if schedule is not None:
                assert max(schedule.order.count(index) for index in range(40)) <= most + 1


@pytest.mark.parametrize("seed", range(40))
def test_every_order_is_legal(seed: int) -> None:
    rng = random.Random(seed)
    for graph in (random_graph(seed, 7, EVERYTHING), joint_graph(SHAPES["series_parallel"](rng, 12), rng, EVERYTHING)):
        if chain_of(graph) is not None:
            steps = steps_of(graph)
            for slots in range(1, 6):
                simulate(graph, Schedule.from_order(graph, steps.order(slots)))


def blocks(n: int) -> Graph:
    """A chain of blocks of three operators, with a mask that every block reads and a large value inside."""
    builder = Builder()
    mask = builder.add("forward", [], [3], 1.0)
    state = builder.add("forward", [], [10], 1.0)
    inner: list[list[int]] = []
    for _ in range(n):
        wide = builder.add("forward", [*state, *mask], [40], 1.0)
        bent = builder.add("forward", wide, [40], 1.0)
        inner.append([*wide, *bent, *state])
        state = builder.add("forward", [*bent, *state], [10], 1.0)
    gradient: list[int] = []
    for read in reversed(inner):
        gradient = builder.add("backward", [*gradient, *read, *mask], [10], 1.0)
    return builder.graph()


def test_what_lies_inside_of_a_step_is_made_again_for_its_backward_only() -> None:
    graph = blocks(16)
    loose = Revolve().solve(graph, peak_of(graph) // 2)
    assert loose.schedule is not None
    assert loose.schedule.order.count(0) == 1  # the mask is kept
    last_of_blocks = [4 + 3 * i for i in range(16)]
    assert all(loose.schedule.order.count(index) == 1 for index in last_of_blocks)  # every state has its slot
    tight = Revolve().solve(graph, 250)
    assert tight.schedule is not None
    assert tight.overhead > loose.overhead


def test_no_chain() -> None:
    graph = forward_graph(SHAPES["chain"](random.Random(0), 5), random.Random(0))
    assert "no backward phase" in (Revolve().applies_to(graph) or "")
    strands = [(), ()] + [(i - 2, i - 1) for i in range(2, 40)]
    solution = Revolve().solve(joint_graph(strands, random.Random(1)), 10)
    assert solution.status is Status.NOT_APPLICABLE
    assert "nothing cuts the forward graph" in solution.message
