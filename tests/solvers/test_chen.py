"""Chen et al. 2016: golden segments, the growth of memory on chains, and what counts as a cut."""

from __future__ import annotations

import random

import networkx
import pytest

from graph_capture.graph import Graph
from solvers.chain_cuts import chain_of, segment_order
from solvers.chen import ChenGreedy, ChenSqrt, equal_segments, greedy_segments
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.solution import Status
from tests.solvers.random_graphs import (
    EVERYTHING,
    SHAPES,
    Builder,
    forward_graph,
    joint_graph,
    random_graph,
    series_parallel,
    training_chain,
)


def sqrt_peak(n: int) -> int:
    graph = training_chain(n)
    return ChenSqrt().solve(graph, simulate_peak(graph) - 1).predicted_peak_bytes


def simulate_peak(graph: Graph) -> int:
    return simulate(graph, Schedule.store_all(graph)).peak_bytes


def test_golden_segments_of_a_chain() -> None:
    chain = chain_of(training_chain(10))
    assert chain is not None
    assert len(chain) == 10
    assert equal_segments(chain) == (1, 4, 6)  # 4 = ⌈√10⌉ segments of 2, 3, 2, 3 layers
    assert greedy_segments(chain, 25) == (2, 5, 8)  # a segment ends when it has made more than 25 bytes: 3 layers


def test_golden_order_of_a_chain() -> None:
    # Layers 0-4 forward, 5-9 backward (5 belongs to layer 4); segments {0, 1}, {2, 3}, {4}. The backward of layer i
    # reads the outputs of layers i and i-1, so layer 2 is recomputed before 6 (layer 3), and 0 before 8 (layer 1).
    assert segment_order(training_chain(5), (1, 3)) == [0, 1, 2, 3, 4, 5, 2, 6, 7, 0, 8, 9]


@pytest.mark.parametrize("n", [10, 30, 100, 300, 1000, 3000, 10_000])
def test_memory_grows_with_the_square_root(n: int) -> None:
    # ⌈√n⌉ boundaries, one segment of about √n layers, three values for the backward operator at work
    assert 10 * n**0.5 <= sqrt_peak(n) <= 10 * (2 * n**0.5 + 4)


def test_less_than_one_more_forward_pass() -> None:
    for n in (10, 100, 1000):
        solution = ChenSqrt().solve(training_chain(n), sqrt_peak(n))
        assert 0 < solution.overhead < 0.5


def test_greedy_follows_the_budget() -> None:
    graph = training_chain(100)
    peak_bytes = simulate_peak(graph)
    overheads = [ChenGreedy().solve(graph, int(peak_bytes * f)).overhead for f in (0.9, 0.7, 0.5, 0.3)]
    assert overheads == sorted(overheads)
    # One threshold for all segments: the cheapest plan cuts in the middle and recomputes the first half
    assert overheads[0] < 0.25


@pytest.mark.parametrize("seed", range(8))
def test_cuts_are_the_dominators(seed: int) -> None:
    """Without long-lived values: an operator is a cut where networkx says that it dominates all that follow."""
    shape = series_parallel(random.Random(seed), 14)
    graph = joint_graph(shape, random.Random(seed))
    chain = chain_of(graph)
    assert chain is not None
    nx_graph = graph.to_networkx().subgraph(range(14))
    dominators = networkx.immediate_dominators(nx_graph, 0)
    trunk, node = set(), 13
    while node != 0:
        node = dominators[node]
        trunk.add(node)
    assert trunk <= set(chain.cuts)
    if not chain.long_lived:
        assert set(chain.cuts) == trunk


def masked(n: int) -> Graph:
    """A chain whose every layer also reads a mask that is made first."""
    builder = Builder()
    mask = builder.add("forward", [], [3], 1.0)
    made = [builder.add("forward", [], [10], 1.0)]
    for _ in range(n - 1):
        made.append(builder.add("forward", [*made[-1], *mask], [10], 1.0))
    gradient: list[int] = []
    for index in range(n - 1, -1, -1):
        gradient = builder.add("backward", [*gradient, *made[index], *mask], [10], 1.0)
    return builder.graph()


def test_a_mask_read_by_every_layer_is_kept() -> None:
    graph = masked(16)
    chain = chain_of(graph)
    assert chain is not None
    assert chain.long_lived == {0}
    solution = ChenSqrt().solve(graph, simulate_peak(graph) - 1)
    assert solution.schedule is not None
    assert solution.schedule.order.count(0) == 1
    assert solution.predicted_peak_bytes < 0.7 * simulate_peak(graph)


def test_operators_that_must_not_run_twice_are_kept() -> None:
    for seed in range(20):
        graph = random_graph(seed, 7, EVERYTHING)
        chain = chain_of(graph)
        if chain is not None:
            for threshold in (1, 10, 20):
                schedule = Schedule.from_order(graph, segment_order(graph, greedy_segments(chain, threshold)))
                simulate(graph, schedule)
                assert max(schedule.order.count(i) for i in range(len(graph))) <= 2


def test_no_backward_phase() -> None:
    graph = forward_graph(SHAPES["chain"](random.Random(0), 5), random.Random(0))
    assert "no backward phase" in (ChenSqrt().applies_to(graph) or "")
    assert ChenSqrt().solve(graph, 10).status is Status.NOT_APPLICABLE


def test_no_cut() -> None:
    # two strands that are never one, read in turns; none of their values lives longer than another
    strands = [(), ()] + [(i - 2, i - 1) for i in range(2, 40)]
    graph = joint_graph(strands, random.Random(1))
    assert chain_of(graph) is None
    solution = ChenGreedy().solve(graph, simulate_peak(graph) - 1)
    assert solution.status is Status.NOT_APPLICABLE
    assert "nothing cuts the forward graph" in solution.message


def test_thousands_of_operators() -> None:
    graph = training_chain(1300)
    solution = ChenGreedy(thresholds=12).solve(graph, simulate_peak(graph) // 4)
    assert solution.status is Status.FEASIBLE
