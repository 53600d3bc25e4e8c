"""The snapshot relaxation: what is in memory at a few instants, what is recomputed between them, and rows anywhere.

Operators first run in captured order. *Instants* t_0 = 0 < t_1 < ... are operators; *segment* i is everything from the
run of t_i to just before the run of t_{i+1}. Columns, for flexible values v and repeatable operators o:

    k[i,v] = 1   v is in memory while operator t_i first runs           (v made first before t_i)
    r[i,o] = 1   o is recomputed in segment i                           (o first run before its end)
    h[i,v] = 1   v stays through segment i without being remade

    minimise     Σ seconds(o) · r[i,o]
    k[i,p] = 1                              p input of operator t_i                                     (1)
    k[i,p] + r[i,producer(p)] ≥ 1           p input of another operator of segment i, made before t_i    (2)
    r[i,o] ≤ k[i,p] + r[i,producer(p)]      p input of o, made before t_i                                (3)
    k[i+1,v] ≤ h[i,v] + r[i,producer(v)],   h[i,v] ≤ k[i,v]                  v made before t_i           (4)

    k[i,v] = 0                              v must be released, and t_i is the first operator of the loss (5)

and a memory row at any position j of a segment (see :meth:`_Builder.memory_row`); what keeps the program tight when
there are several instants is in :mod:`~solvers.snapshot.nesting` and :mod:`~solvers.snapshot.windows`, and memory while
an operator is recomputed in :mod:`~solvers.snapshot.bursts`. Every schedule that runs each operator first in captured
order gives a point of these columns that satisfies all rows, whatever the instants and positions: a dual bound of the
program is a lower bound on its recomputed seconds, and infeasibility is a proof.
It stays a relaxation even with every instant and every burst: what is remade in a burst does not count in its rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from solvers.snapshot.bursts import add_bursts
from solvers.snapshot.milp import LinearProgram
from solvers.snapshot.nesting import add_nesting
from solvers.snapshot.reduction import Reduction
from solvers.snapshot.windows import MOST_ROWS, Window, WindowBuilder

ROW_SLACK = 1e-6
"""Memory rows are loosened by this fraction of the budget, the feasibility tolerance of the engines, so that a
schedule which meets the budget exactly lies inside of the feasible set and no rounding can cut it off."""

PERCENT = 100.0
"""The objective is in percent of the store-all step, which suits the engines' absolute tolerances."""


@dataclass(frozen=True)
class Relaxation:
    """One relaxation: the program and the meaning of its columns.

    **Fields:**

    - `instants`: positions t_0 = 0, t_1, ...; `ends[i]` is the end of segment i (exclusive).
    - `keep[i]`: value -> column k[i,v]; `rerun[i]`: operator -> column r[i,o] (two operators may share a column);
      `hold[i]`: value -> column h[i,v] (k[i+1,v] itself where the value cannot be remade);
      `nested[i]`: operator -> column R[i,o], recomputed in segment i or later; `windows`: the same, of other runs of
      segments.
    """

    instants: tuple[int, ...]
    ends: tuple[int, ...]
    keep: tuple[dict[int, int], ...]
    rerun: tuple[dict[int, int], ...]
    hold: tuple[dict[int, int], ...]
    nested: tuple[dict[int, int], ...]
    windows: tuple[Window, ...]
    program: LinearProgram


def build(
    reduction: Reduction,
    budget_bytes: int,
    instants: Collection[int],
    rows: Collection[int] | None = None,
    surcharge_bytes: Mapping[int, int] | None = None,
    window_rows: int = MOST_ROWS,
    bursts: Collection[int] = (),
) -> Relaxation:
    """The relaxation with these instants, and memory rows at them and at `rows` (`None`: at every position).

    `bursts`: operators whose recomputation gets a memory row in every segment.

    With `surcharge_bytes`, bytes by position that are charged on top, it is no relaxation any more: its points are
    worth lifting, its bound and its infeasibility say nothing. `window_rows`: the most rows at which the program is
    still given another window.
    """
    builder = _Builder(reduction, budget_bytes, sorted({0, *instants}), rows)
    for position, surcharge in (surcharge_bytes or {}).items():
        builder.static[position] += surcharge / budget_bytes
    for i in range(len(builder.instants)):
        builder.add_keep_columns(i)
    for i in range(len(builder.instants)):
        builder.add_rerun_columns(i)
    for i in range(len(builder.instants)):
        builder.add_segment(i)
    segments = zip(map(range, builder.instants, builder.ends), builder.rerun, builder.hold, strict=True)
    add_bursts(builder.program, reduction, budget_bytes, builder.capacity, bursts, tuple(segments))
    nested = add_nesting(builder.program, reduction, builder.instants, builder.keep, builder.rerun)
    windows = WindowBuilder(builder.program, reduction, builder.instants, builder.keep, builder.rerun)
    return Relaxation(
        instants=tuple(builder.instants),
        ends=tuple(builder.ends),
        keep=tuple(builder.keep),
        rerun=tuple(builder.rerun),
        hold=tuple(builder.hold),
        nested=nested,
        windows=windows.add_all(window_rows),
        program=builder.program,
    )


class _Builder:
    def __init__(
        self, reduction: Reduction, budget_bytes: int, instants: Sequence[int], rows: Collection[int] | None
    ) -> None:
        self.reduction = reduction
        self.values = reduction.graph.values
        self.instants = list(instants)
        self.ends = [*instants[1:], len(reduction.graph)]
        self.rows = rows
        self.program = LinearProgram()
        self.keep: list[dict[int, int]] = [{} for _ in instants]
        self.rerun: list[dict[int, int]] = [{} for _ in instants]
        self.hold: list[dict[int, int]] = []
        self.weight = [v.size_bytes / budget_bytes for v in self.values]
        self.capacity = 1.0 + ROW_SLACK
        self.static = [b / budget_bytes for b in reduction.static_bytes]
        step_seconds = reduction.graph.step_seconds or 1.0
        self.price = [PERCENT * o.seconds / step_seconds for o in reduction.graph.operators]

    def producer(self, value: int) -> int:
        return self.values[value].producer

    def add_keep_columns(self, i: int) -> None:
        """k[i,v] for values made before t_i that can still be wanted and that no exchange makes superfluous."""
        start, reduction = self.instants[i], self.reduction
        released = reduction.released if start == reduction.turn else frozenset[int]()
        for o in range(start):
            for v in reduction.outputs[o]:
                gone = v in reduction.eliminated and reduction.eliminated[v] < start
                if reduction.last_want[v] >= start and not gone:
                    self.keep[i][v] = self.program.add_column(upper=0.0 if v in released else 1.0)  # (5)

    def add_rerun_columns(self, i: int) -> None:
        """r[i,o]; an operator whose one value is eliminated shares the column of the consumer that eliminates it."""
        start, reduction = self.instants[i], self.reduction
        rerun = self.rerun[i]
        for o in range(self.ends[i] - 1, -1, -1):
            outputs = reduction.outputs[o]
            if not reduction.repeatable[o]:
                continue
            wanted_until = max(reduction.last_want[v] for v in outputs)
            if wanted_until < start or (o >= start and wanted_until <= o + 1):
                continue  # nobody wants its values in this segment, or nobody could miss them
            if len(outputs) == 1 and outputs[0] in reduction.eliminated:
                consumer = reduction.eliminated[outputs[0]]
                if consumer < start:
                    if consumer in rerun:
                        rerun[o] = rerun[consumer]
                        self.program.costs[rerun[o]] += self.price[o]
                    continue
            rerun[o] = self.program.add_column(self.price[o])

    def add_segment(self, i: int) -> None:
        needs = self._needs(i)
        self._supply_direct_uses(i, needs)
        self._supply_reruns(i)
        hold = self._carry(i)
        self.hold.append(hold)
        for j in range(self.instants[i], self.ends[i]):
            if j == self.instants[i] or self.rows is None or j in self.rows:
                self.memory_row(i, j, needs, hold)

    def _needs(self, i: int) -> dict[int, int]:
        """Flexible value -> last operator of the segment that reads it."""
        return {v: j for j in range(self.instants[i], self.ends[i]) for v in self.reduction.inputs[j]}

    def _available(self, i: int, value: int) -> list[tuple[int, float]]:
        """k[i,v] + r[i,producer(v)], as far as the columns exist."""
        keep, rerun = self.keep[i].get(value), self.rerun[i].get(self.producer(value))
        return [(column, 1.0) for column in (keep, rerun) if column is not None]

    def _supply_direct_uses(self, i: int, needs: dict[int, int]) -> None:
        start = self.instants[i]
        at_start = self.reduction.inputs[start]
        for v in at_start:
            self.program.lower[self.keep[i][v]] = 1.0  # (1)
        for v in needs:
            if self.producer(v) < start and v not in at_start:
                self.program.at_least(self._available(i, v), 1.0)  # (2)

    def _supply_reruns(self, i: int) -> None:
        start = self.instants[i]
        for o, column in self.rerun[i].items():
            for v in self.reduction.inputs[o]:
                if self.producer(v) < start and self.rerun[i].get(self.producer(v)) != column:
                    self.program.at_least([*self._available(i, v), (column, -1.0)], 0.0)  # (3)

    def _carry(self, i: int) -> dict[int, int]:
        """Rows (4) for what is in memory at the next instant; returns the columns h[i,v]."""
        hold: dict[int, int] = {}
        if i + 1 == len(self.instants):
            return hold
        start, reduction, program = self.instants[i], self.reduction, self.program
        for v, next_keep in self.keep[i + 1].items():
            remade = self.rerun[i].get(self.producer(v))
            consumer = reduction.superseded.get(v)
            if consumer is not None and start <= consumer < self.ends[i]:
                # an instance from before its consumer ran is superseded: only a later recomputation can be there
                program.at_least([(next_keep, -1.0)] + ([(remade, 1.0)] if remade is not None else []), 0.0)
            elif self.producer(v) >= start:
                continue
            elif remade is None:
                program.at_least([(self.keep[i][v], 1.0), (next_keep, -1.0)], 0.0)
                hold[v] = next_keep
            else:
                hold[v] = program.add_column(integer=False)  # integral in every vertex that matters: max(0, k' - r)
                program.at_least([(hold[v], 1.0), (remade, 1.0), (next_keep, -1.0)], 0.0)
                program.at_least([(self.keep[i][v], 1.0), (hold[v], -1.0)], 0.0)
        return hold

    def memory_row(self, i: int, j: int, needs: dict[int, int], hold: dict[int, int]) -> None:
        """What is certainly in memory while operator j of segment i first runs must fit.

        Its inputs and outputs, what is constant, and: at j = t_i everything kept; later, each value that is read
        again in the segment unless it is remade in it; each value held through the segment; and each value made in
        the segment before j that is kept at the next instant, unless it is remade. A value that is remade in the
        segment may be absent at j and counts as 0.
        """
        start, weight = self.instants[i], self.weight
        present = {*self.reduction.inputs[j], *self.reduction.outputs[j]}
        constant = self.static[j] + sum(weight[v] for v in present)
        terms: list[tuple[int, float]] = []
        if j == start:
            constant -= sum(weight[v] for v in self.reduction.inputs[j])  # they have a column, fixed at 1
            terms += [(column, weight[v]) for v, column in self.keep[i].items()]
        else:
            next_keep = self.keep[i + 1] if i + 1 < len(self.instants) else {}
            counted = set(present)
            for v, last in needs.items():
                if last > j and self.producer(v) < j and v not in counted:
                    counted.add(v)
                    constant += weight[v]
                    if (remade := self.rerun[i].get(self.producer(v))) is not None:
                        terms.append((remade, -weight[v]))
            terms += [(column, weight[v]) for v, column in hold.items() if v not in counted]
            for v, column in next_keep.items():
                if start <= self.producer(v) < j and v not in counted and v not in hold:
                    if self._is_superseded(i, v):
                        continue
                    terms.append((column, weight[v]))
                    if (remade := self.rerun[i].get(self.producer(v))) is not None:
                        terms.append((remade, -weight[v]))
        constant -= self._taken_over(i, j, needs, terms)
        self.program.at_most(terms, self.capacity - constant)

    def _is_superseded(self, i: int, value: int) -> bool:
        consumer = self.reduction.superseded.get(value)
        return consumer is not None and self.instants[i] <= consumer < self.ends[i]

    def _taken_over(self, i: int, j: int, needs: dict[int, int], terms: list[tuple[int, float]]) -> float:
        """Weight that an output of j may take over from a dying input: a constant, or a term of the remade one.

        An input that is read again in the segment can die at j only if it is remade in the segment.
        """
        constant = 0.0
        pairs = self.reduction.in_place_bytes[j]
        for source, _ in pairs:
            remade = self.rerun[i].get(self.producer(source))
            if needs.get(source, j) <= j:
                constant = max(constant, self.weight[source])
            elif remade is not None:
                if len(pairs) > 1:
                    constant = max(constant, self.weight[source])
                else:
                    terms.append((remade, -self.weight[source]))
        return constant
