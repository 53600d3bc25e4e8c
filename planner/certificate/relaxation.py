"""Inequalities that every schedule of the *ordered* class satisfies, rebuilt from the graph alone, in integers.

**The class.** Operators 0, 1, ... first run in this order; any of them may run again, anywhere, any number of times.
The bytes alive never exceed the budget, in the regimes that the graph asks for.

**The columns.** Given are *instants*, operators t_0 = 0 < t_1 < ... Segment i is what happens from the first run of
t_i until just before the first run of t_{i+1} (or until the end). A *modelled* value is an activation of at least
`smallest_modelled_bytes` (any number will do). A schedule decides, for a modelled v and an operator o, whether

    k[i,v] = 1   v is in memory when t_i begins its first run          (v first made before t_i)
    r[i,o] = 1   o runs again in segment i                             (o before the end of the segment)
    h[i,v] = 1   v is in memory from the first run of t_i until that of t_{i+1}, without interruption

    and its seconds of recomputation are at least Σ seconds(o) · r[i,o].

**The rows**, each in the form Σ a·x ≥ b; p(v) is the operator that makes v, and p(v) < t_i in the first four:

    need[i,v]      k[i,v] + r[i,p(v)] ≥ 1            v is read by the first run of an operator in segment i: its
                                                     instance was there at t_i, or was made since, by a repetition
    rerun[i,o,v]   k[i,v] + r[i,p(v)] - r[i,o] ≥ 0   v is an input of o: the same for a repetition of o
    hold[i,v]      k[i,v] - h[i,v] ≥ 0               by definition
    carry[i,v]     h[i,v] + r[i,p(v)] - k[i+1,v] ≥ 0 what is there at t_{i+1} stayed, or was made in segment i
    memory[j]      budget ≥ bytes in memory while operator j of segment i first runs

For memory[j], these bytes are certainly there, each value counted once:

- what no schedule changes: resident memory, outputs and gradients with their deliveries, the workspace of j;
- the inputs and outputs of j; and a value that cannot be made again, from its producer to its last reader;
- at j = t_i, bytes · k[i,v];
- at a later j: bytes · (1 - r[i,p(v)]) for v made before j that a later first run of the segment reads (without a
  repetition, the instance that is read was made before j);
- else bytes · h[i,v] for v made before t_i; else bytes · (k[i+1,v] - r[i,p(v)]) for v first made inside of the segment
  before j (without a repetition, the instance at t_{i+1} is the first one, and was there at j);
- *less* what j may take over in place: the largest input that may die at j. An input that a later first run of the
  segment reads can die only if it is made again in the segment: then bytes · r[i,p(v)]. One that cannot be made again
  and is read later does not die.

**The ranges.** A value is *wanted* until its last reader, or the last want of what a repeatable reader makes of it,
modelled values only. k[i,v] may be set to 0 where v is not wanted at t_i or later, r[i,o] where nothing that o makes is
wanted at t_i or later, and after o. All rows still hold: what is read in a segment is wanted there; if r[i,o] is kept,
the inputs of o are wanted as long as its outputs, so that the right sides of rerun keep their columns, and so with
carry; memory rows only lose bytes, because a term - r[i,p(v)] stands beside a value that is wanted. k[i,v] = 1 where
t_i reads v, or where v cannot be made again and is read at t_i or later.

So a lower bound on Σ seconds · r over all 0/1 points, or over any larger set, bounds every schedule of the class. An
operator can run again if it is marked so, is no part of the loss, and makes activations only: an output or a gradient
is never freed, and a value that is in memory cannot be made.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from graph_capture.graph import Graph
from planner.certificate.certain import certain_bytes

Column = tuple[str, int, int]
"""("k" | "h", segment, value) or ("r", segment, operator)."""

RowName = tuple[str | int, ...]
"""("need" | "hold" | "carry", segment, value), ("rerun", segment, operator, value) or ("memory", operator)."""


class UnknownRowError(ValueError):
    """A name that is no row of the relaxation; the message says why."""


@dataclass(frozen=True)
class Row:
    """Σ terms[column] · column ≥ least; bytes in memory rows, counts in the others."""

    terms: dict[Column, int]
    least: int


class Relaxation:
    """The rows by name, and the ranges of the columns.

    **Fields:**

    - `instants`: t_0 = 0 < t_1 < ...; `ends`: the ends of the segments.
    - `repeatable`: by operator. `modelled`, `last_read`, `last_want`: by value, positions in captured order.

    Raises :class:`ValueError` if the instants are not those of the docstring.
    """

    def __init__(
        self, graph: Graph, budget_bytes: int, instants: tuple[int, ...], smallest_modelled_bytes: int
    ) -> None:
        if not instants or instants[0] != 0 or list(instants) != sorted(set(instants)) or instants[-1] >= len(graph):
            raise ValueError(f"instants {instants} are not operators in ascending order that begin with 0")
        self.graph = graph
        self.budget_bytes = budget_bytes
        self.smallest_modelled_bytes = smallest_modelled_bytes
        self.instants = instants
        self.ends = (*instants[1:], len(graph))
        self.modelled = [
            v.kind == "activation" and v.size_bytes >= max(1, smallest_modelled_bytes) for v in graph.values
        ]
        self.repeatable = [
            o.recomputable
            and o.phase != "loss"
            and bool(o.outputs)
            and all(graph.values[v].kind == "activation" for v in o.outputs)
            for o in graph.operators
        ]
        self.last_read = [max(readers, default=graph.values[v].producer) for v, readers in enumerate(graph.uses)]
        self.last_want = self._last_wants()
        self.certain_bytes = certain_bytes(graph, self.repeatable)
        self._last_gain = [
            max((self.last_want[v] for v in o.outputs if self.modelled[v]), default=-1) for o in graph.operators
        ]

    def _last_wants(self) -> list[int]:
        wants = list(self.last_read)
        for operator in reversed(self.graph.operators):
            for v in operator.outputs:
                for reader in self.graph.uses[v]:
                    if self.repeatable[reader]:
                        made = self.graph.operators[reader].outputs
                        wants[v] = max([wants[v], *(wants[w] for w in made if self.modelled[w])])
        return wants

    # ---------------------------------------------------------------- columns

    def producer(self, value: int) -> int:
        """p(v)."""
        return self.graph.values[value].producer

    def segment_of(self, position: int) -> int:
        """The segment of an operator's first run."""
        return bisect.bisect_right(self.instants, position) - 1

    def keeps(self, segment: int, value: int) -> bool:
        """Whether k[i,v] is in its range."""
        start = self.instants[segment]
        return self.modelled[value] and self.producer(value) < start <= self.last_want[value]

    def reruns(self, segment: int, operator: int) -> bool:
        """Whether r[i,o] is in its range."""
        if not self.repeatable[operator] or operator >= self.ends[segment]:
            return False
        return self._last_gain[operator] >= max(self.instants[segment], operator + 1)

    def holds(self, segment: int, value: int) -> bool:
        """Whether h[i,v] is in its range."""
        last = segment + 1 == len(self.instants)
        return not last and self.producer(value) < self.instants[segment] and self.keeps(segment + 1, value)

    def box(self, column: Column) -> tuple[int, int]:
        """The smallest and the largest value of a column that the docstring proves."""
        kind, segment, index = column
        if kind == "r":
            return (0, 1) if self.reruns(segment, index) else (0, 0)
        if kind == "h":
            return (0, 1) if self.holds(segment, index) else (0, 0)
        if not self.keeps(segment, index):
            return (0, 0)
        start, producer = self.instants[segment], self.producer(index)
        read = index in self.graph.operators[start].inputs
        return (1, 1) if read or (not self.repeatable[producer] and start <= self.last_read[index]) else (0, 1)

    # ---------------------------------------------------------------- rows

    def row(self, name: RowName) -> Row:
        """The row of that name; raises :class:`UnknownRowError` if there is none."""
        kind, *indices = name
        numbers = [index for index in indices if isinstance(index, int)]
        arity = {"need": 2, "hold": 2, "carry": 2, "rerun": 3, "memory": 1}
        if kind not in arity or len(numbers) != len(indices) or len(indices) != arity[str(kind)]:
            raise UnknownRowError(f"{list(name)} is not the name of a row")
        if kind == "memory":
            if not 0 <= numbers[0] < len(self.graph):
                raise UnknownRowError(f"{list(name)}: there is no such operator")
            return self._memory(numbers[0])
        segment, value = numbers[0], numbers[-1]
        if not (0 <= segment < len(self.instants) and 0 <= value < len(self.graph.values)):
            raise UnknownRowError(f"{list(name)}: there is no such segment or value")
        if not self.modelled[value] or self.producer(value) >= self.instants[segment]:
            raise UnknownRowError(f"{list(name)}: value {value} is not modelled, or made after the segment's instant")
        return self._flow(str(kind), segment, value, numbers[1])

    def _flow(self, kind: str, segment: int, value: int, operator: int) -> Row:
        keep, again = ("k", segment, value), ("r", segment, self.producer(value))
        if kind == "need":
            if value not in self._readers_in(segment):
                raise UnknownRowError(f"['need', {segment}, {value}]: nothing in the segment reads the value")
            return Row({keep: 1, again: 1}, 1)
        if kind == "rerun":
            if not 0 <= operator < self.ends[segment] or value not in self.graph.operators[operator].inputs:
                raise UnknownRowError(f"['rerun', {segment}, {operator}, {value}]: no such operator reads the value")
            return Row({keep: 1, again: 1, ("r", segment, operator): -1}, 0)
        if segment + 1 == len(self.instants):
            raise UnknownRowError(f"['{kind}', {segment}, {value}]: the last segment has none")
        if kind == "hold":
            return Row({keep: 1, ("h", segment, value): -1}, 0)
        return Row({("h", segment, value): 1, again: 1, ("k", segment + 1, value): -1}, 0)

    @cached_property
    def _reads(self) -> list[dict[int, int]]:
        """For each segment the values that its first runs read, with the last of these."""
        spans = zip(self.instants, self.ends, strict=True)
        return [{v: j for j in range(*span) for v in self.graph.operators[j].inputs} for span in spans]

    def _readers_in(self, segment: int) -> dict[int, int]:
        return self._reads[segment]

    def is_certain(self, value: int, position: int) -> bool:
        """Whether an activation is in memory while an operator first runs, whatever the schedule."""
        operator, producer = self.graph.operators[position], self.producer(value)
        if value in operator.inputs or value in operator.outputs:
            return True
        return not self.repeatable[producer] and producer < position <= self.last_read[value]

    def _memory(self, j: int) -> Row:
        segment = self.segment_of(j)
        terms: dict[Column, int] = {}
        present = self.certain_bytes[j]
        if j == self.instants[segment]:
            for v in self._kept(segment):
                if not self.is_certain(v, j):
                    _add(terms, ("k", segment, v), -self.graph.values[v].size_bytes)
        else:
            present += self._later_reads(segment, j, terms)
            self._carried(segment, j, terms)
        return Row(terms, present - self._taken_over(segment, j, terms) - self.budget_bytes)

    def _later_reads(self, segment: int, j: int, terms: dict[Column, int]) -> int:
        """Adds bytes · (1 - r) for what is read later in the segment; returns the constant part."""
        constant = 0
        for v, last in self._reads[segment].items():
            if self.modelled[v] and self.producer(v) < j < last and not self.is_certain(v, j):
                size = self.graph.values[v].size_bytes
                constant += size
                _add(terms, ("r", segment, self.producer(v)), size)
        return constant

    def _carried(self, segment: int, j: int, terms: dict[Column, int]) -> None:
        """Adds what is in memory at j because it is there at the next instant and was not made again."""
        start, reads = self.instants[segment], self._reads[segment]
        for v in self._kept(segment + 1):
            producer, size = self.producer(v), self.graph.values[v].size_bytes
            if producer >= j or reads.get(v, -1) > j or self.is_certain(v, j):
                continue
            if producer < start:
                _add(terms, ("h", segment, v), -size)
            else:
                _add(terms, ("k", segment + 1, v), -size)
                _add(terms, ("r", segment, producer), size)

    @cached_property
    def _all_kept(self) -> list[list[int]]:
        values = range(len(self.graph.values))
        return [[v for v in values if self.keeps(i, v)] for i in range(len(self.instants))]

    def _kept(self, segment: int) -> list[int]:
        return self._all_kept[segment] if segment < len(self.instants) else []

    def _taken_over(self, segment: int, j: int, terms: dict[Column, int]) -> int:
        """Bytes that an output of j may take over from an input that dies: a constant, and terms in r."""
        constant = 0
        for source in dict.fromkeys(s for s, _ in self.graph.operators[j].in_place):
            value, producer = self.graph.values[source], self.producer(source)
            if value.kind != "activation" or (not self.repeatable[producer] and self.last_read[source] > j):
                continue
            if self._reads[segment].get(source, j) > j and self.modelled[source]:
                _add(terms, ("r", segment, producer), value.size_bytes)
            else:
                constant = max(constant, value.size_bytes)
        return constant

    def flow_rows(self) -> Iterator[RowName]:
        """The names of all rows but memory rows, as far as their columns are in range."""
        for i in range(len(self.instants)):
            start, end = self.instants[i], self.ends[i]
            for v in self._reads[i]:
                if self.modelled[v] and self.producer(v) < start and self.box(("k", i, v)) == (0, 1):
                    yield "need", i, v
            for o in range(end):
                if self.reruns(i, o):
                    for v in self.graph.operators[o].inputs:
                        if self.modelled[v] and self.producer(v) < start and self.box(("k", i, v)) == (0, 1):
                            yield "rerun", i, o, v
            for v in self._kept(i + 1):
                if self.holds(i, v):
                    yield "hold", i, v
                    yield "carry", i, v


def _add(terms: dict[Column, int], column: Column, coefficient: int) -> None:
    terms[column] = terms.get(column, 0) + coefficient
