"""The forward graph with every operator's decision, as data: a block is a run of operators; equal ones count as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from graph_capture.graph import Graph
from planner.by_block import block_of
from planner.folding import fold_label, template_of
from planner.report.lifetimes import alive_after_forward
from solvers.schedule import Schedule

Decision = Literal["kept", "again", "pinned", "passing"]
DECISIONS: dict[Decision, str] = {
    "kept": "kept for the backward pass",
    "again": "released, and computed again",
    "pinned": "kept, because it must not run twice",
    "passing": "not needed by the backward pass",
}


@dataclass(frozen=True)
class Cell:
    """One operator. `size_bytes`: of its values that are kept or released; of all its values if it is passing."""

    name: str
    target: str
    module: str
    source: str
    decision: Decision
    size_bytes: int
    seconds: float
    note: str


@dataclass(frozen=True)
class Block:
    """Operators that run one after another, and the edges among them (positions in `cells`).

    **Fields:**

    - `label`: the block, or the folded name of all blocks that look the same. `blocks`: how many those are.
    - `entering`: positions of cells that read what another block made.
    """

    label: str
    blocks: int
    cells: tuple[Cell, ...]
    edges: tuple[tuple[int, int], ...]
    entering: frozenset[int]


def blocks_of(graph: Graph, schedule: Schedule) -> list[Block]:
    """The blocks in the order of the forward pass; the second and later of equal ones are only counted."""
    runs: list[tuple[str, list[int]]] = []
    for index, operator in enumerate(graph.operators):
        if operator.phase != "backward":
            label = block_of(operator.module) or operator.module.split(".")[0]
            if runs and not operator.module and not any(graph.values[v].size_bytes for v in operator.outputs):
                label = runs[-1][0]  # a buffer is written: what writes it is no step of the model's own
            if not runs or runs[-1][0] != label:
                runs.append((label, []))
            runs[-1][1].append(index)
    cells = _Cells(graph, schedule)
    groups: dict[Hashable, list[tuple[str, list[int]]]] = {}
    for label, indices in runs:
        look = tuple(cells.look(i, indices[0]) for i in indices)
        groups.setdefault((template_of(label), look), []).append((label, indices))
    return [_block(cells, group) for group in groups.values()]


def _block(cells: _Cells, group: list[tuple[str, list[int]]]) -> Block:
    indices = group[-1][1]  # the first of equal blocks may read inputs, where the others read what a block made
    place = {index: position for position, index in enumerate(indices)}
    edges: list[tuple[int, int]] = []
    entering: set[int] = set()
    for index, position in place.items():
        for producer in cells.graph.producers(index):
            if producer in place:
                edges.append((place[producer], position))
            else:
                entering.add(position)
    label = fold_label([label for label, _ in group]) or "(model itself)"
    return Block(label, len(group), tuple(map(cells.cell, indices)), tuple(edges), frozenset(entering))


class _Cells:
    """Decisions of the operators of one schedule."""

    def __init__(self, graph: Graph, schedule: Schedule) -> None:
        self.graph = graph
        self.kept = alive_after_forward(graph, schedule)
        self.saved = alive_after_forward(graph, Schedule.store_all(graph)) | self.kept
        self.runs = Counter(schedule.order)

    def cell(self, index: int) -> Cell:
        """One operator and what was decided for it."""
        operator = self.graph.operators[index]
        decision = self._decision(index)
        counted = [v for v in operator.outputs if v in self.saved] or list(operator.outputs)
        extra = self.runs[index] - 1
        note = operator.keep_reason if decision == "pinned" else f"runs {extra + 1} times" if extra else ""
        size = sum(self.graph.values[v].size_bytes for v in counted)
        return Cell(
            operator.name, operator.target, operator.module, operator.source, decision, size, operator.seconds, note
        )

    def look(self, index: int, first: int) -> Hashable:
        """What must agree for two blocks to be drawn as one."""
        operator = self.graph.operators[index]
        inside = tuple(p - first for p in self.graph.producers(index) if p >= first)
        sizes = tuple(self.graph.values[v].size_bytes for v in operator.outputs)
        return operator.target, self._decision(index), self.runs[index], sizes, inside

    def _decision(self, index: int) -> Decision:
        operator = self.graph.operators[index]
        if self.runs[index] > 1:
            return "again"
        if any(v in self.kept for v in operator.outputs):
            return "kept" if operator.recomputable else "pinned"
        return "passing"
