"""Schedules: round trips, and what `from_order` promises for any sequence of executions."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.graph import Graph
from solvers.schedule import Compute, Free, Schedule, outside_loss, programs_of
from solvers.simulator import simulate
from solvers.structure import repeatable
from tests.solvers.random_graphs import EVERYTHING, PLAIN, Builder, random_graph, training_chain


@st.composite
def orders(draw: st.DrawFn) -> tuple[Graph, list[int]]:
    """A random graph and captured order with some recomputations put into it, anywhere after the first run."""
    features = draw(st.sampled_from([PLAIN, EVERYTHING]))
    graph = random_graph(draw(st.integers(0, 500)), draw(st.integers(1, 7)), features)
    order = list(range(len(graph)))
    again = [i for i in order if repeatable(graph, i)]
    for operator in draw(st.lists(st.sampled_from(again), max_size=5)) if again else []:
        order.insert(draw(st.integers(order.index(operator) + 1, len(order))), operator)
    return graph, order


@settings(max_examples=150, deadline=None)
@given(orders())
def test_from_order_is_legal_and_frees_everything(case: tuple[Graph, list[int]]) -> None:
    graph, order = case
    schedule = Schedule.from_order(graph, order)
    simulate(graph, schedule)
    alive: set[int] = set()
    for step in schedule.steps:
        if isinstance(step, Compute):
            alive.update(graph.operators[step.operator].outputs)
            alive.discard(step.reuses if step.reuses is not None else -1)
        else:
            alive.remove(step.value)
    assert alive == {v for v, value in enumerate(graph.values) if value.kind != "activation"}


@settings(max_examples=100, deadline=None)
@given(orders())
def test_no_free_could_come_earlier(case: tuple[Graph, list[int]]) -> None:
    """Between a free and the execution before it there are only frees: the value was read or made right there."""
    graph, order = case
    last: Compute | None = None
    for step in Schedule.from_order(graph, order).steps:
        if isinstance(step, Compute):
            last = step
        else:
            assert last is not None
            operator = graph.operators[last.operator]
            assert step.value in (*operator.inputs, *operator.outputs)


@settings(max_examples=100, deadline=None)
@given(orders())
def test_round_trips(case: tuple[Graph, list[int]]) -> None:
    schedule = Schedule.from_order(*case)
    assert Schedule.from_list(json.loads(json.dumps(schedule.to_list()))) == schedule
    assert Schedule.from_order(case[0], schedule.order) == schedule
    assert sorted(schedule.order) == sorted(case[1])


def test_plain_data_by_hand() -> None:
    schedule = Schedule((Compute(0), Compute(1, 0), Free(1)))
    assert schedule.to_list() == [0, [1, 0], -2]


def test_programs() -> None:
    builder = Builder()
    a = builder.add("forward", [], [1], 1.0)
    b = builder.add("loss", a, [1], 1.0)
    builder.add("backward", [*a, *b], [1], 1.0)
    graph = builder.graph()
    assert programs_of(graph, [0, 1, 0, 2]) == ["forward", "loss", "backward", "backward"]
    assert outside_loss(graph, [0, 0, 1, 2]) == [0, 1, 0, 2]


def test_store_all_runs_everything_once() -> None:
    graph = training_chain(5)
    assert Schedule.store_all(graph).order == tuple(range(10))
