"""Memory over one step, as data: when each operator runs, and how many bytes are in use meanwhile."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from graph_capture.graph import Graph
from solvers.schedule import Schedule, programs_of
from solvers.simulator import Simulation


@dataclass(frozen=True)
class Timeline:
    """One schedule's memory over the step; entry i of every tuple belongs to execution i.

    **Fields:**

    - `starts_seconds`: when it begins, as priced; one entry more than executions, the last is the end of the step.
    - `size_bytes`: in use while it runs, workspace included. `operators`: which operator it is.
    - `programs`: `"forward"`, `"loss"` or `"backward"`. `again`: whether it is a recomputation.
    """

    label: str
    starts_seconds: tuple[float, ...]
    size_bytes: tuple[int, ...]
    operators: tuple[int, ...]
    programs: tuple[str, ...]
    again: tuple[bool, ...]

    @property
    def end_seconds(self) -> float:
        """When the step ends."""
        return self.starts_seconds[-1]

    @property
    def peak_position(self) -> int:
        """The first execution at which the most memory is in use; 0 if nothing runs."""
        return self.size_bytes.index(max(self.size_bytes)) if self.size_bytes else 0

    def spans(self) -> list[tuple[str, float, float]]:
        """The programs, each with its start and end in seconds."""
        found: list[tuple[str, float, float]] = []
        position = 0
        for program, group in itertools.groupby(self.programs):
            length = len(list(group))
            found.append((program, self.starts_seconds[position], self.starts_seconds[position + length]))
            position += length
        return found

    def bins(self, count: int, end_seconds: float) -> list[Bin]:
        """The step cut into `count` slices of `end_seconds`: of each the extremes, so that no peak is lost."""
        members: list[list[int]] = [[] for _ in range(count)]
        for position in range(len(self.size_bytes)):
            first = self._slice(self.starts_seconds[position], count, end_seconds)
            last = self._slice(self.starts_seconds[position + 1], count, end_seconds)
            for number in range(first, last + 1):
                members[number].append(position)
        return [self._bin(number, positions) for number, positions in enumerate(members) if positions]

    def _slice(self, seconds: float, count: int, end_seconds: float) -> int:
        return min(count - 1, int(count * seconds / end_seconds)) if end_seconds else 0

    def _bin(self, number: int, positions: list[int]) -> Bin:
        highest = max(positions, key=lambda p: self.size_bytes[p])
        return Bin(number, self.size_bytes[highest], min(self.size_bytes[p] for p in positions), highest)


@dataclass(frozen=True)
class Bin:
    """One slice of the step: the most and the least bytes in use in it, and the execution with the most."""

    number: int
    highest_bytes: int
    lowest_bytes: int
    position: int


def timeline_of(label: str, graph: Graph, schedule: Schedule, simulation: Simulation) -> Timeline:
    """The timeline of a schedule, in the micro-batch that binds."""
    order = schedule.order
    seen: set[int] = set()
    again: list[bool] = []
    for index in order:
        again.append(index in seen)
        seen.add(index)
    starts = itertools.accumulate((graph.operators[index].seconds for index in order), initial=0.0)
    return Timeline(
        label, tuple(starts), simulation.timeline_bytes, order, tuple(programs_of(graph, order)), tuple(again)
    )
