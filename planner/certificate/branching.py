"""Best-first branch and bound over linear relaxations: a tree whose leaves carry multipliers.

Part of the maker of certificates. At each step the leaf with the smallest bound is split at a fractional column; the
smallest bound of all leaves is what the tree proves. It ends when that reaches the bound that is wanted, at the limit
of leaves or of time, or when a leaf's point is integral: this relaxation has no more to give.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from planner.certificate.deadline import Deadline
from planner.certificate.linear import LinearAnswer, LinearProgramError, RelaxedProgram
from planner.certificate.relaxation import Column

CANDIDATES = 6
"""So many columns are tried at every split; the one whose two children raise the bound most is taken."""


@dataclass
class Node:
    """A leaf while `column` is `None`, else a split with its children's indices."""

    answer: LinearAnswer
    column: Column | None = None
    zero: int = -1
    one: int = -1


class Branching:
    """Grows a tree; `nodes[0]` is the root, `bound_seconds` what the tree proves (in floating point)."""

    def __init__(self, program: RelaxedProgram, root: LinearAnswer) -> None:
        self.program = program
        self.nodes = [Node(root)]
        self.leaves = 1
        self._fixed: list[dict[Column, int]] = [{}]
        self._order = itertools.count()
        self._open = [(root.bound_seconds, next(self._order), 0)]

    @property
    def bound_seconds(self) -> float:
        """The smallest bound of the leaves."""
        return self._open[0][0]

    def grow(self, wanted_seconds: float, leaf_limit: int, deadline: Deadline) -> None:
        """Split until the bound reaches `wanted_seconds`, or a limit."""
        while self.bound_seconds < wanted_seconds and self.leaves < leaf_limit and not deadline.passed:
            _, _, index = self._open[0]
            deadline.say(f"branching, {self.leaves} leaves", self.bound_seconds)
            try:
                if not self._split(index, deadline):
                    return
            except LinearProgramError:
                if not deadline.passed:
                    raise
                return

    def _split(self, index: int, deadline: Deadline) -> bool:
        node, fixed = self.nodes[index], self._fixed[index]
        candidates = self._candidates(node.answer)
        while not candidates:
            answer = self.program.solve_with_all_rows(fixed, deadline.seconds_left)
            if answer.bound_seconds <= node.answer.bound_seconds:
                return False
            node.answer = answer
            heapq.heapreplace(self._open, (answer.bound_seconds, next(self._order), index))
            return True
        best: tuple[float, Column, LinearAnswer, LinearAnswer] | None = None
        for column in candidates:
            zero, one = (self._ask({**fixed, column: side}, deadline) for side in (0, 1))
            score = _score(node.answer.bound_seconds, zero, one)
            if best is None or score > best[0]:
                best = (score, column, zero, one)
        assert best is not None
        _, node.column, zero, one = best
        heapq.heappop(self._open)
        node.zero, node.one = (self._append(a, {**fixed, best[1]: s}) for s, a in ((0, zero), (1, one)))
        self.leaves += 1
        return True

    def _append(self, answer: LinearAnswer, fixed: dict[Column, int]) -> int:
        self.nodes.append(Node(answer))
        self._fixed.append(fixed)
        heapq.heappush(self._open, (answer.bound_seconds, next(self._order), len(self.nodes) - 1))
        return len(self.nodes) - 1

    def _ask(self, fixed: Mapping[Column, int], deadline: Deadline) -> LinearAnswer:
        return self.program.solve(fixed, deadline.seconds_left)

    def _candidates(self, answer: LinearAnswer) -> list[Column]:
        """The fractional columns that promise most: repetitions by their seconds, then the larger values."""
        graph = self.program.relaxation.graph

        def weight(item: tuple[Column, float]) -> tuple[bool, float]:
            (kind, _, index), x = item
            size = graph.operators[index].seconds if kind == "r" else float(graph.values[index].size_bytes)
            return kind == "r", size * min(x, 1.0 - x)

        ranked = sorted(answer.fractional().items(), key=weight, reverse=True)
        return [column for column, _ in ranked[:CANDIDATES]]


def _score(before: float, zero: LinearAnswer, one: LinearAnswer) -> float:
    """The usual product rule: both children should rise."""
    floor = 1e-6 * max(before, 1e-300)
    gains = (min(answer.bound_seconds - before, 1e3 * max(before, 1e-300)) for answer in (zero, one))
    low, high = sorted(max(gain, floor) for gain in gains)
    return low * high
