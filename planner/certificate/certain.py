"""Bytes that are in memory while an operator first runs, in every schedule that keeps the captured order."""

from __future__ import annotations

from collections.abc import Sequence

from graph_capture.graph import Graph


def certain_bytes(graph: Graph, repeatable: Sequence[bool]) -> list[int]:
    """For each operator: resident memory, outputs and gradients, workspace, its inputs and outputs, and activations.

    Counted are the activations that no schedule can do without: those that cannot be made again, from their producer
    to their last reader. Everything is in the worse of the regimes that the graph asks for; both have the same
    activations, so that the larger constant is right for both.
    """
    regimes = [False, True] if graph.gradient_accumulation else [False]
    constants = [_constant_bytes(graph, later) for later in regimes]
    activations = _activation_bytes(graph, repeatable)
    return [max(rows) + here for *rows, here in zip(*constants, activations, strict=True)]


def _activation_bytes(graph: Graph, repeatable: Sequence[bool]) -> list[int]:
    changes = [0] * (len(graph) + 1)
    lasting: set[int] = set()
    for v, value in enumerate(graph.values):
        if value.kind == "activation" and not repeatable[value.producer]:
            lasting.add(v)
            changes[value.producer] += value.size_bytes
            changes[max(graph.uses[v], default=value.producer) + 1] -= value.size_bytes
    total, running = [0] * len(graph), 0
    for j, operator in enumerate(graph.operators):
        running += changes[j]
        here = {*operator.inputs, *operator.outputs} - lasting
        total[j] = running + sum(graph.values[v].size_bytes for v in here if graph.values[v].kind == "activation")
    return total


def _constant_bytes(graph: Graph, later: bool) -> list[int]:
    """What is no activation. A gradient goes when it is delivered, unless the captured order itself reads it later."""
    due: dict[int, list[int]] = {}
    for v, value in enumerate(graph.values):
        if value.delivered_after is not None:
            due.setdefault(value.delivered_after, []).append(v)
    live = sum(graph.resident_bytes.values()) + (graph.accumulated_gradient_bytes if later else 0)
    peaks: list[int] = []
    for j, operator in enumerate(graph.operators):
        live += sum(graph.values[v].size_bytes for v in operator.outputs if graph.values[v].kind != "activation")
        peak = live + operator.workspace_bytes
        for v in due.get(j, ()):
            copy = 0 if later else graph.values[v].delivery_copy_bytes
            live += copy
            peak = max(peak, live)
            if (copy or later) and max(graph.uses[v], default=-1) <= j:
                live -= graph.values[v].size_bytes
        peaks.append(peak)
    return peaks
