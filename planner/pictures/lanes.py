"""The biggest tensors, as data: from when to when each is in memory, equal ones of equal blocks in one lane."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from graph_capture.graph import Graph
from planner.folding import fold_label, template_of
from planner.pictures.timeline import Timeline
from planner.report.lifetimes import Lifetime, lifetimes
from solvers.schedule import Schedule


@dataclass(frozen=True)
class Stay:
    """One stay of one value in memory, in seconds from the start of the step; `again` if it was recomputed."""

    module: str
    start_seconds: float
    end_seconds: float
    again: bool


@dataclass(frozen=True)
class Lane:
    """Equal values; `size_bytes` is the sum over all of them, whether they are in memory together or not."""

    label: str
    target: str
    tensor: str
    values: int
    size_bytes: int
    stays: tuple[Stay, ...]


def lanes_of(graph: Graph, schedule: Schedule, timeline: Timeline, *, later: bool, count: int = 10) -> list[Lane]:
    """The `count` biggest lanes, the biggest first."""
    by_value: dict[int, list[Lifetime]] = {}
    for life in lifetimes(graph, schedule, later=later):
        by_value.setdefault(life.value, []).append(life)
    groups: dict[Hashable, list[int]] = {}
    for index, value in enumerate(graph.values):
        producer = graph.operators[value.producer]
        key = template_of(producer.module), producer.target, producer.phase, value.size_bytes, value.shape, value.kind
        if value.size_bytes and index in by_value:
            groups.setdefault(key, []).append(index)
    biggest = sorted(groups.values(), key=lambda g: -sum(graph.values[v].size_bytes for v in g))[:count]
    return [_lane(graph, timeline, indices, by_value) for indices in biggest]


def _lane(graph: Graph, timeline: Timeline, indices: list[int], by_value: dict[int, list[Lifetime]]) -> Lane:
    first = graph.values[indices[0]]
    modules = [graph.operators[graph.values[v].producer].module for v in indices]
    stays: list[Stay] = []
    for value, module in zip(indices, modules, strict=True):
        for number, life in enumerate(sorted(by_value[value], key=lambda life: life.first)):
            start, end = timeline.starts_seconds[life.first], timeline.starts_seconds[life.last + 1]
            stays.append(Stay(module, start, end, number > 0))
    shape = ", ".join(map(str, first.shape))
    return Lane(
        label=fold_label(modules) or "(model itself)",
        target=graph.operators[first.producer].target,
        tensor=f"{first.dtype}[{shape}]" if first.dtype else first.kind,
        values=len(indices),
        size_bytes=sum(graph.values[v].size_bytes for v in indices),
        stays=tuple(stays),
    )
