"""The staged mixed-integer program: stages of many operators, a fixed order inside of them, a memory row for each run.

Stage s is the first runs of operators b_s … b_{s+1} - 1. Before these, any operator from before the stage may run
again, at most once per stage. Columns, for *flexible* values v and repeatable operators o:

    k[s,v] = 1   v is in memory when stage s begins          (v first made before it)
    r[s,o] = 1   o runs again in stage s                     (o before the stage)

    minimise  Σ seconds(o) · r[s,o]
    k[s,v] + r[s,p(v)] ≥ 1               v is read by a first run of the stage
    k[s,v] + r[s,p(v)] ≥ r[s,u]          v is an input of u
    k[s,v] + r[s,p(v)] ≥ k[s+1,v]
    k[s,v] + r[s,p(v)] ≤ 1               nothing is made while it is still there

*Just in time*: the place of a repetition inside of its stage is fixed, right before the first operator of the stage
that can need it, directly or through other repetitions (before the stage's last operator if only later stages can),
in captured order among those of one place. So every run of a stage has its fixed position x, and v is in memory at x
with weight k before the position of its repetition, k + r at it, and N after it, where N[s,v,x] ≥ r of each reader at
or behind x and ≥ k[s+1,v] is a running maximum; 1 up to the last first run that reads it. The sum over all values is
one column U[s,x] per position, made from the one before it by the few terms that change: no product of columns, and
rows of a handful of terms.

Conservative where stages hold many operators (repetitions only at fixed places, at most once, none of the stage's own
operators); Checkmate's program where every operator is a stage. A value is *not* flexible, its life is a constant, if
it is *tiny* (it then stays as long as anything can want it) or can neither be made again nor be wanted after its last
reader. Beyond these: in-place reuse counts only where the allocation is surely of the same program.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from graph_capture.graph import Graph
from solvers.snapshot.milp import LinearProgram
from solvers.structure import repeatable

Terms = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """One possible execution in a stage: the first run of an operator (`column` is the constant 1), or a repetition.

    `before`: the operator whose first run follows next, or is this one.
    """

    operator: int
    before: int
    column: int
    first: bool


class StageColumns:
    """The columns k and r, the order inside of each stage, and the rows that tie them together.

    **Fields:**

    - `program`: seconds are fractions of the step. `one`: a column that is 1.
    - `keep[s]`: value -> column of k[s,v]. `again[s]`: operator -> column of r[s,o]. `runs[s]`: in their order.
    """

    def __init__(self, graph: Graph, boundaries: Sequence[int], tiny_bytes: int) -> None:
        self.graph = graph
        self.starts = list(boundaries)
        self.ends = [*boundaries[1:], len(graph)]
        self.program = LinearProgram()
        self.one = self.program.add_column(integer=False)
        self.program.lower[self.one] = 1.0
        self.repeatable = [repeatable(graph, i) and bool(graph.operators[i].outputs) for i in range(len(graph))]
        self.last_read = [max(readers, default=graph.values[v].producer) for v, readers in enumerate(graph.uses)]
        self.tiny = [v.size_bytes < tiny_bytes or v.size_bytes == 0 for v in graph.values]
        self.last_want = self._last_wants()
        self.flexible = [
            value.kind == "activation"
            and not self.tiny[v]
            and (self.repeatable[value.producer] or self.last_want[v] > self.last_read[v])
            for v, value in enumerate(graph.values)
        ]
        self.keep: list[dict[int, int]] = [self._keep_columns(s) for s in range(len(self.starts))]
        self.again: list[dict[int, int]] = []
        self.runs: list[list[Run]] = []
        for s in range(len(self.starts)):
            self._add_runs(s)
        for s in range(len(self.starts)):
            self._add_flow(s)

    def _last_wants(self) -> list[int]:
        wants = list(self.last_read)
        for operator in reversed(self.graph.operators):
            for v in operator.outputs:
                for reader in self.graph.uses[v]:
                    if self.repeatable[reader]:
                        wants[v] = max([wants[v], *(wants[w] for w in self.graph.operators[reader].outputs)])
        return wants

    def _keep_columns(self, s: int) -> dict[int, int]:
        start, values = self.starts[s], self.graph.values
        wanted = (v for v in range(len(values)) if self.flexible[v] and values[v].producer < start <= self.last_want[v])
        return {v: self.program.add_column() for v in wanted}

    def _add_runs(self, s: int) -> None:
        """The columns r of a stage, and the place of each repetition."""
        graph, start, end = self.graph, self.starts[s], self.ends[s]
        step_seconds = graph.step_seconds or 1.0
        place: dict[int, int] = {}
        columns: dict[int, int] = {}
        for o in range(start - 1, -1, -1):
            made = [v for v in graph.operators[o].outputs if self.flexible[v]]
            if not self.repeatable[o] or max((self.last_want[v] for v in made), default=-1) < start:
                continue
            needs = [end - 1]
            for v in made:
                readers = graph.uses[v]
                needs += [place[u] for u in readers if u in place]
                needs += readers[bisect.bisect_left(readers, start) :][:1]
            if graph.operators[min(needs)].phase != "loss":
                place[o] = min(needs)
                columns[o] = self.program.add_column(graph.operators[o].seconds / step_seconds)
        repetitions = [Run(o, place[o], columns[o], first=False) for o in sorted(place)]
        firsts = [Run(j, j, self.one, first=True) for j in range(start, end)]
        self.again.append(columns)
        self.runs.append(sorted([*repetitions, *firsts], key=lambda run: (run.before, run.first, run.operator)))

    def present(self, s: int, value: int) -> Terms:
        """k[s,v] + r[s,p(v)] of a value from before the stage."""
        columns = (self.keep[s].get(value), self.again[s].get(self.graph.values[value].producer))
        return [(column, 1.0) for column in columns if column is not None]

    def _add_flow(self, s: int) -> None:
        graph, program, start = self.graph, self.program, self.starts[s]
        direct = {v for j in range(start, self.ends[s]) for v in graph.operators[j].inputs if self.flexible[v]}
        for v in sorted(direct):
            if graph.values[v].producer < start:
                program.at_least(self.present(s, v), 1.0)
        for o, column in self.again[s].items():
            for v in graph.operators[o].inputs:
                if self.flexible[v]:
                    program.at_least([*self.present(s, v), (column, -1.0)], 0.0)
        for v in self.keep[s]:
            if len(present := self.present(s, v)) == 2:
                program.at_most(present, 1.0)
        for v, column in self.keep_after(s).items():
            if graph.values[v].producer < start:
                program.at_least([*self.present(s, v), (column, -1.0)], 0.0)

    def keep_after(self, s: int) -> dict[int, int]:
        """The columns k of the next stage; none after the last."""
        return self.keep[s + 1] if s + 1 < len(self.keep) else {}

    def order(self, columns: dict[int, float]) -> list[int]:
        """The executions of an integer point."""
        return [run.operator for runs in self.runs for run in runs if run.first or columns.get(run.column, 0.0) > 0.5]

    @cached_property
    def fixed_bytes(self) -> list[tuple[int, int]]:
        """For each operator: bytes of the activations that are not flexible, before its run and during it."""
        n, values = len(self.graph), self.graph.values
        changes: dict[int, int] = defaultdict(int)
        born = [0] * n
        for v, value in enumerate(values):
            if value.kind == "activation" and not self.flexible[v]:
                until = self.last_want[v] if self.tiny[v] else self.last_read[v]
                born[value.producer] += value.size_bytes
                changes[value.producer + 1] += value.size_bytes
                changes[until + 1] -= value.size_bytes
        bytes_at: list[tuple[int, int]] = []
        running = 0
        for j in range(n):
            running += changes[j]
            bytes_at.append((running, running + born[j]))
        return bytes_at
