"""What is done by hand with `torch.utils.checkpoint`, as schedules: exact orders, and legal on any graph."""

from __future__ import annotations

import dataclasses

import pytest

from planner.by_block import by_block
from solvers.simulator import simulate
from tests.planner.plans import chain
from tests.solvers.random_graphs import EVERYTHING, random_graph


def test_a_block_runs_again_where_its_backward_begins() -> None:
    graph = chain(4)
    modules = ["h.0", "h.0", "h.1", "h.1", "h.1", "h.1", "h.0", "h.0", "h.0"]
    operators = tuple(dataclasses.replace(o, module=m) for o, m in zip(graph.operators, modules, strict=True))
    every, second, selective = by_block(dataclasses.replace(graph, operators=operators))
    # Block 0 hands f1 to block 1: it stays. Nothing but the backward pass reads f3, the end of block 1: it runs again,
    # and what it reads with it.
    assert every.schedule.order == (0, 1, 2, 3, 2, 3, 4, 5, 6, 0, 7, 8)
    assert second.schedule.order == (0, 1, 2, 3, 4, 5, 6, 0, 7, 8)
    assert selective.schedule.order == tuple(range(9))  # all of these are matrix products, which it keeps


def test_a_model_without_blocks_has_none() -> None:
    graph = chain()
    operators = tuple(dataclasses.replace(o, module="body") for o in graph.operators)
    assert by_block(dataclasses.replace(graph, operators=operators)) == []


@pytest.mark.parametrize("seed", range(40))
def test_legal_on_any_graph(seed: int) -> None:
    graph = random_graph(seed, 9, EVERYTHING)
    operators = tuple(dataclasses.replace(o, module=f"h.{i // 3}") for i, o in enumerate(graph.operators))
    graph = dataclasses.replace(graph, operators=operators)
    for one in by_block(graph):
        simulation = simulate(graph, one.schedule)
        assert simulation.recomputed_seconds >= 0
