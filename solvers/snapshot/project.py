"""From a whole sequence of executions to the point of a relaxation that it stands for: the inverse of lifting.

Every schedule of the ordered class gives a point of the relaxation, whatever the instants: what is in memory when each
instant's operator first runs, what is recomputed in each segment, what stays through one. MILP engines take it as a
start. The two exchanges of :mod:`~solvers.snapshot.reduction` are not undone: a sequence that keeps a superseded value
gives a point that breaks a row, which an engine refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

from solvers.snapshot.reduction import Reduction
from solvers.snapshot.relaxation import Relaxation


def project(reduction: Reduction, relaxation: Relaxation, order: Sequence[int]) -> dict[int, float]:
    """Column -> value (0 or 1) of a legal sequence whose first executions keep captured order."""
    graph = reduction.graph
    rerun_in, starts = _segments(relaxation, order)
    kept = _kept(reduction, order, starts)
    point: dict[int, float] = {}
    for i, columns in enumerate(relaxation.rerun):
        for operator, column in columns.items():
            if operator in rerun_in[i]:
                point[column] = 1.0
    for i, columns in enumerate(relaxation.nested):
        for operator, column in columns.items():
            if any(point.get(rerun.get(operator, -1)) for rerun in relaxation.rerun[i:]):
                point[column] = 1.0
    for window in relaxation.windows:
        for operator, column in window.columns.items():
            segments = relaxation.rerun[window.first : window.end]
            if any(point.get(rerun.get(operator, -1)) for rerun in segments):
                point[column] = 1.0
    for i, columns in enumerate(relaxation.keep):
        for value, column in columns.items():
            point[column] = float(value in kept[i])
    for i, columns in enumerate(relaxation.hold):
        for value, column in columns.items():
            if column not in point:  # else it is k[i+1,v] itself
                point[column] = float(value in kept[i + 1] and graph.values[value].producer not in rerun_in[i])
    return point


def _segments(relaxation: Relaxation, order: Sequence[int]) -> tuple[list[set[int]], list[int]]:
    """What is recomputed in each segment, and the position of each instant's first execution."""
    segment_of = {instant: i for i, instant in enumerate(relaxation.instants)}
    rerun_in: list[set[int]] = [set() for _ in relaxation.instants]
    starts = [0] * len(relaxation.instants)
    seen: set[int] = set()
    segment = 0
    for position, operator in enumerate(order):
        if operator in seen:
            rerun_in[segment].add(operator)
            continue
        seen.add(operator)
        if operator in segment_of:
            segment = segment_of[operator]
            starts[segment] = position
    return rerun_in, starts


def _kept(reduction: Reduction, order: Sequence[int], starts: Sequence[int]) -> list[set[int]]:
    """For each instant the flexible values in memory: made before it, and read at it or later before being remade."""
    wanted: set[int] = set()
    kept: list[set[int]] = [set() for _ in starts]
    instant_at = {position: i for i, position in enumerate(starts)}
    for position in range(len(order) - 1, -1, -1):
        operator = order[position]
        wanted.difference_update(reduction.outputs[operator])
        wanted.update(reduction.inputs[operator])
        if position in instant_at:
            kept[instant_at[position]] = set(wanted)
    return kept
