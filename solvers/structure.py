"""Facts about a graph that several solvers ask for."""

from __future__ import annotations

from graph_capture.graph import Graph


def repeatable(graph: Graph, operator: int) -> bool:
    """Whether an operator may run again.

    Not if it says so itself; nor if it belongs to the loss, which the caller runs; nor if it makes a value that is
    handed to the caller, because that instance stays until the end of the step.
    """
    item = graph.operators[operator]
    only_activations = all(graph.values[v].kind == "activation" for v in item.outputs)
    return item.recomputable and item.phase != "loss" and only_activations
