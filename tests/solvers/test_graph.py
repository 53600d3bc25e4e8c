"""The graph: what it refuses, JSON, fingerprints, networkx."""

from __future__ import annotations

import dataclasses
import json
import math

import networkx
import pytest

from graph_capture.graph import Graph, GraphError, Operator, Value
from tests.solvers.random_graphs import EVERYTHING, random_graph, training_chain

A = Operator("a", "t", "forward", (), (0,), 1.0)
B = Operator("b", "t", "backward", (0,), (1,), 1.0)
VALUES = (Value(1, 0), Value(1, 1))


def change(operator: Operator, **fields: object) -> Operator:
    return dataclasses.replace(operator, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("operators", "values", "message"),
    [
        ((change(A, inputs=(1,)), B), VALUES, "made by no operator before it .missing producer or cycle"),
        ((A, change(B, inputs=(1,))), VALUES, "missing producer or cycle"),
        ((A, change(B, inputs=(5,))), VALUES, "outside of 0..1"),
        ((A, change(B, inputs=(0, 0))), VALUES, "name a value twice"),
        ((A, change(B, outputs=())), VALUES, "does not list it among its outputs"),
        ((A, change(B, outputs=(0, 1))), VALUES, "names operator 0 as its producer"),
        ((A, change(B, name="a")), VALUES, "occurs twice"),
        ((A, change(B, seconds=math.nan)), VALUES, "finite and not negative"),
        ((A, change(B, seconds=-1.0)), VALUES, "finite and not negative"),
        ((A, change(B, seconds=math.inf)), VALUES, "finite and not negative"),
        ((A, change(B, workspace_bytes=-1)), VALUES, "workspace_bytes"),
        ((A, change(B, flops=0.5)), VALUES, "flops"),
        ((A, change(B, random_state_bytes=-2)), VALUES, "random_state_bytes"),
        ((A, change(B, phase="sideways")), VALUES, "not one of forward, loss, backward"),
        ((change(A, phase="backward"), change(B, phase="forward")), VALUES, "stands after a later phase"),
        ((A, change(B, in_place=((1, 0),))), VALUES, "not an .input, output. of it"),
        ((A, change(B, in_place=((0, 1),))), (Value(1, 0), Value(2, 1)), "differ in size"),
        ((A, B), (Value(-1, 0), Value(1, 1)), "size_bytes is -1"),
        ((A, B), (Value(1, 0), Value(1, 1, "gradient")), "exactly the gradients"),
        ((A, B), (Value(1, 0), Value(1, 1, delivered_after=1)), "exactly the gradients"),
        ((A, B), (Value(1, 0), Value(1, 1, "gradient", 0)), "before it is made"),
        ((A, B), (Value(1, 0), Value(1, 1, "gradient", 2)), "before it is made"),
        ((A, B), (Value(1, 0), Value(1, 1, "thing")), "kind 'thing'"),
        ((A, B), (Value(1, 0), Value(1, 0)), "names operator 0 as its producer"),
    ],
)
def test_bad_graphs(operators: tuple[Operator, ...], values: tuple[Value, ...], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        Graph(operators, values)


def test_bad_resident_memory() -> None:
    with pytest.raises(GraphError, match="'parameters' is -1"):
        Graph((), (), {"parameters": -1})
    with pytest.raises(GraphError, match="accumulated_gradient_bytes"):
        Graph((), (), accumulated_gradient_bytes=-1)


@pytest.mark.parametrize("seed", range(10))
def test_json_round_trip(seed: int) -> None:
    graph = random_graph(seed, 6, EVERYTHING)
    again = Graph.from_dict(json.loads(json.dumps(graph.to_dict())))
    assert again == graph
    assert hash(again) == hash(graph)
    assert (again.fingerprint, again.structure_fingerprint) == (graph.fingerprint, graph.structure_fingerprint)


def test_unreadable_data() -> None:
    data = training_chain(2).to_dict()
    with pytest.raises(GraphError, match="this version can read"):
        Graph.from_dict({**data, "colour": "red"})
    del data["values"]
    with pytest.raises(GraphError, match="this version can read"):
        Graph.from_dict(data)


def test_fingerprints_see_what_matters() -> None:
    small, large = training_chain(4, size_bytes=10), training_chain(4, size_bytes=20)
    assert small.structure_fingerprint == large.structure_fingerprint
    assert small.fingerprint != large.fingerprint
    assert training_chain(4, seconds=2.0).fingerprint == small.fingerprint
    assert training_chain(5).structure_fingerprint != small.structure_fingerprint


def test_networkx() -> None:
    graph = random_graph(7, 8, EVERYTHING)
    nx_graph = graph.to_networkx()
    assert networkx.is_directed_acyclic_graph(nx_graph)
    assert list(nx_graph) == list(range(len(graph)))
    for index in range(len(graph)):
        assert set(nx_graph.predecessors(index)) == set(graph.producers(index))
    passed = {v for _, _, values in nx_graph.edges(data="values") for v in values}
    assert passed == {v for v, readers in enumerate(graph.uses) if readers}


def test_totals() -> None:
    graph = training_chain(3)
    assert (graph.step_seconds, len(graph), graph.last_forward, graph.resident_total_bytes) == (6.0, 6, 2, 0)
    assert Graph((), ()).last_forward == -1
