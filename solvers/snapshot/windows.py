"""Rows over runs of consecutive segments: what makes several instants worth more than the sum of their parts.

A *window* (a, b) is the time from the first run of instant t_a until that of t_b: segments a, ..., b-1. It has one
more column per operator,

    W[a,b,o] = 1   o is recomputed in the window
    r[i,o] ≤ W[a,b,o] for the segments i of the window,   W[a,b,o] ≤ W[a,b-1,o] + r[b-1,o]          (9)
    k[a,p] + W[a,b,producer(p)] ≥ 1              p input of an operator of the window, made before t_a  (10)
    W[a,b,o] ≤ k[a,p] + W[a,b,producer(p)]       p input of o, made before t_a                          (11)
    k[b,v] ≤ k[a,v] + W[a,b,producer(v)]         v made before t_a                                      (12)

*Proof* that every schedule of the ordered class satisfies them, at every choice of instants: (9) is the definition of
W. What is read in the window, by a first run (10) or by a recomputation (11), or is in memory when it ends (12), was
made before the window began, and is an instance that was in memory at t_a, or it was made inside of the window; as its
producer first ran before t_a, that was a recomputation. A point with whole k and r satisfies them already, with
W[a,b,o] = max r[i,o]: windows make the *linear* relaxation tighter, and so the search for the optimum shorter.

How much is lost without them: where half of a schedule keeps one value at t_a and the other half another one, each
half may in the next segment live on what the *other* one has remade in this one. Summed along a path of operators,
(10) and (11) say that whatever is not kept at t_a anywhere on the path has been remade from its beginning, within
the window. A chain of 24 layers with two slots has a linear bound of 41.7 % of the step without windows, of 109.1 %
with them, and an optimum of at most 125 %; ViT-B/16 within 11.36 % of its memory, asked at its 12 widest positions,
25.6 % and 31.5 %.

The windows of one segment are the rows of the segments, those that end with the step are in
:mod:`~solvers.snapshot.nesting`; before t_0 nothing is made, so no window begins there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from solvers.snapshot.milp import LinearProgram
from solvers.snapshot.nesting import either_columns
from solvers.snapshot.reduction import Reduction

MOST_ROWS = 12_000
"""No window is begun in a program with more rows than that: a program of 30,000 takes the engines a few seconds, one of
60,000 a minute, most of it before the first branch."""


@dataclass(frozen=True)
class Window:
    """Segments `first`, ..., `end` - 1, and operator -> column W[first,end,o]."""

    first: int
    end: int
    columns: dict[int, int]


@dataclass(frozen=True)
class WindowBuilder:
    """Adds columns and rows to `program`; `keep` and `rerun` as in :class:`~solvers.snapshot.relaxation.Relaxation`."""

    program: LinearProgram
    reduction: Reduction
    instants: Sequence[int]
    keep: Sequence[Mapping[int, int]]
    rerun: Sequence[Mapping[int, int]]

    def add_all(self, most_rows: int = MOST_ROWS) -> tuple[Window, ...]:
        """Windows of two segments or more that end before the step does, the shortest first, as far as there is room.

        None is begun once the program has more than `most_rows` rows.
        """
        windows: list[Window] = []
        last = len(self.instants) - 1
        columns: dict[int, Mapping[int, int]] = dict(enumerate(self.rerun))
        for length in range(2, last):
            for first in range(1, last - length + 1):
                if len(self.program.row_lower) > most_rows:
                    return tuple(windows)
                end = first + length
                # rows (9)
                columns[first] = made = either_columns(self.program, columns[first], self.rerun[end - 1])
                self._supply(first, end, made)
                windows.append(Window(first, end, made))
        return tuple(windows)

    def _supply(self, first: int, end: int, columns: Mapping[int, int]) -> None:
        """Rows (10), (11), (12) of one window; (10) for its last segment, the others are those of shorter windows."""
        inputs, start = self.reduction.inputs, self.instants[first]
        for value in {v for j in range(self.instants[end - 1], self.instants[end]) for v in inputs[j]}:
            if self._producer(value) < start:
                self.program.at_least(self._available(first, value, columns), 1.0)  # (10)
        rows: set[tuple[int, int]] = set()
        for operator, column in columns.items():
            for value in inputs[operator]:
                producer = self._producer(value)
                if producer < start and columns.get(producer) != column and (column, value) not in rows:
                    rows.add((column, value))
                    self.program.at_least([*self._available(first, value, columns), (column, -1.0)], 0.0)  # (11)
        for value, column in self.keep[end].items():
            if self._producer(value) < start:
                self.program.at_least([*self._available(first, value, columns), (column, -1.0)], 0.0)  # (12)

    def _producer(self, value: int) -> int:
        return self.reduction.graph.values[value].producer

    def _available(self, first: int, value: int, columns: Mapping[int, int]) -> list[tuple[int, float]]:
        """k[a,v] + W[a,b,producer(v)], as far as the columns exist."""
        made = (self.keep[first].get(value), columns.get(self._producer(value)))
        return [(column, 1.0) for column in made if column is not None]
