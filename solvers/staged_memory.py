"""Memory rows of the staged program: the bytes at every possible run of every stage, in both regimes.

:mod:`solvers.staged_model` has the formulation. Everything that the simulator counts is here: workspace, the saved
state of random operators, outputs and gradients with their deliveries, in-place reuse.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from solvers.staged_model import Run, StageColumns, Terms


@dataclass(frozen=True)
class Constant:
    """Bytes of what is no activation around the first run of an operator, in one regime.

    `before`, `during` (workspace left out), and after it while deliveries go on: pairs of bytes and the terms of
    gradients that stay because something reads them again.
    """

    before: tuple[int, Terms]
    during: tuple[int, Terms]
    deliveries: tuple[tuple[int, Terms], ...]


class StageMemory:
    """Adds the rows to a model. `hopeless` says what exceeds the budget by itself, if something does."""

    def __init__(self, model: StageColumns, budget_bytes: float) -> None:
        self.model = model
        self.graph = model.graph
        self.program = model.program
        self.budget_bytes = budget_bytes
        self.unit = max(budget_bytes, 1.0) / 1000
        # No sum of bytes comes near this. A far larger bound (1e9) made HiGHS call feasible programs infeasible.
        everything = sum(v.size_bytes for v in self.graph.values)
        everything += sum(o.random_state_bytes for o in self.graph.operators)
        self.most = 2.0 * everything / self.unit + 1.0
        self.hopeless: str | None = None
        self.states = self._random_states()
        retained = self._retained_gradients()
        regimes = [False, True] if self.graph.gradient_accumulation else [False]
        self.constants = [self._constants(retained, later) for later in regimes]
        for s in range(len(model.starts)):
            self._add_stage(s)

    def _at_least_all(self, columns: list[int | None], upper: int) -> None:
        for column in columns:
            if column is not None and column != upper:
                self.program.at_least([(upper, 1.0), (column, -1.0)], 0.0)

    def _random_states(self) -> dict[tuple[int, int], int]:
        """H[s,o] = 1: the random state of operator o is replayed in stage s or later."""
        states: dict[tuple[int, int], int] = {}
        for s in range(len(self.model.starts) - 1, -1, -1):
            for o, operator in enumerate(self.graph.operators[: self.model.starts[s]]):
                runs = [states.get((s + 1, o)), self.model.again[s].get(o)]
                if operator.random_state_bytes and any(run is not None for run in runs):
                    states[s, o] = self.program.add_column(integer=False)
                    self._at_least_all(runs, states[s, o])
        return states

    def _retained_gradients(self) -> dict[int, int]:
        """For each gradient that may be read after its delivery the column that says so; `one` if that is certain."""
        retained: dict[int, int] = {}
        for v, value in enumerate(self.graph.values):
            after, readers = value.delivered_after, self.graph.uses[v]
            if after is None or not readers:
                continue
            if max(readers) > after:
                retained[v] = self.model.one
                continue
            stages = [s for s, end in enumerate(self.model.ends) if end > after + 1]
            runs = [self.model.again[s].get(r) for s in stages for r in readers]
            if any(run is not None for run in runs):
                retained[v] = self.program.add_column(integer=False)
                self._at_least_all(runs, retained[v])
        return retained

    def _constants(self, retained: dict[int, int], later: bool) -> list[Constant]:
        graph = self.graph
        due: dict[int, list[int]] = defaultdict(list)
        for v, value in enumerate(graph.values):
            if value.delivered_after is not None:
                due[value.delivered_after].append(v)
        live = graph.resident_total_bytes + (graph.accumulated_gradient_bytes if later else 0)
        terms: Terms = []
        constants: list[Constant] = []
        for j, operator in enumerate(graph.operators):
            before = (live, list(terms))
            live += sum(graph.values[v].size_bytes for v in operator.outputs if graph.values[v].kind != "activation")
            during, deliveries = (live, list(terms)), list[tuple[int, Terms]]()
            for v in due[j]:
                value = graph.values[v]
                copy = 0 if later else value.delivery_copy_bytes
                live += copy
                if copy:
                    deliveries.append((live, list(terms)))
                if copy or later:
                    live -= value.size_bytes
                    if v in retained:
                        terms.append((retained[v], float(value.size_bytes)))
            constants.append(Constant(before, during, tuple(deliveries)))
        return constants

    # ---------------------------------------------------------------- one stage

    def _add_stage(self, s: int) -> None:
        model = self.model
        runs = model.runs[s]
        position = {run.operator: x for x, run in enumerate(runs)}
        changes: list[Terms] = [[] for _ in range(len(runs) + 1)]
        behind: dict[tuple[int, int], int | None] = {}
        for v in range(len(self.graph.values)):
            if model.flexible[v] and self.graph.values[v].producer < model.ends[s]:
                self._add_value(s, v, position, changes, behind)
        self._add_state_bytes(s, position, changes)
        used: int | None = None
        for x, run in enumerate(runs):
            if changes[x] or used is None:
                before: Terms = [] if used is None else [(used, 1.0)]
                column = self.program.add_column(upper=self.most, integer=False)
                scaled = [(c, a / self.unit) for c, a in changes[x]]
                self.program.add_row([*before, *scaled, (column, -1.0)], 0.0, 0.0)
                used = column
            self._limit(run, used, self._reuse(s, run, behind))

    def _add_value(
        self,
        s: int,
        v: int,
        position: dict[int, int],
        changes: list[Terms],
        behind: dict[tuple[int, int], int | None],
    ) -> None:
        """The bytes of a flexible value over a stage; `behind` gets the column of N after each of its readers."""
        model, producer = self.model, self.graph.values[v].producer
        size = float(self.graph.values[v].size_bytes)
        kept = model.keep[s].get(v)
        made = model.one if producer >= model.starts[s] else model.again[s].get(producer)
        if kept is None and made is None:
            return
        need = model.keep_after(s).get(v)
        born = position[producer] if made is not None else -1
        for reader in sorted((r for r in self.graph.uses[v] if r in position), key=lambda r: -position[r]):
            at, run = need, model.runs[s][position[reader]]
            behind[v, reader] = need
            if need is None or run.first:
                at = run.column
            elif need != model.one:
                at = self.program.add_column(integer=False)
                self._at_least_all([run.column, need], at)
            if at != need:
                changes[position[reader] + 1] += self._swap(at, need, size)
                need = at
        if kept is not None and born >= 0:
            changes[0].append((kept, size))
            changes[born + 1].append((kept, -size))
        if made is not None:
            changes[born].append((made, size))
            changes[born + 1].append((made, -size))
        if need is not None:
            changes[born + 1].append((need, size))

    def _swap(self, old: int | None, new: int | None, size: float) -> Terms:
        pairs = ((new, size), (old, -size))
        return [(column, coefficient) for column, coefficient in pairs if column is not None]

    def _add_state_bytes(self, s: int, position: dict[int, int], changes: list[Terms]) -> None:
        """The saved random states: until the last replay, and during one the present state is put aside, too."""
        for o, operator in enumerate(self.graph.operators[: self.model.ends[s]]):
            size = float(operator.random_state_bytes)
            now, after = self.states.get((s, o)), self.states.get((s + 1, o))
            if not size or (now is None and after is None):
                continue
            if o >= self.model.starts[s]:
                changes[position[o]] += self._swap(None, after, size)
                continue
            changes[0] += self._swap(None, now, size)
            changes[position[o] + 1 if o in position else len(changes) - 1] += self._swap(now, after, size)

    def _limit(self, run: Run, used: int, reuse: Terms) -> None:
        """Hold a run, with what exists only while it lasts, within the budget."""
        operator = self.graph.operators[run.operator]
        for constants in self.constants:
            constant = constants[run.before]
            activations = self.model.fixed_bytes[run.before][int(run.first)]
            if not run.first:
                extra = [(run.column, float(operator.workspace_bytes + operator.random_state_bytes)), *reuse]
                self._add_limit(run, used, [*extra, *constant.before[1]], constant.before[0] + activations)
                continue
            live, terms = constant.during
            self._add_limit(run, used, [*reuse, *terms], live + activations + operator.workspace_bytes)
            for live, terms in constant.deliveries:
                self._add_limit(run, used, [*reuse, *terms], live + activations)

    def _add_limit(self, run: Run, used: int, terms: Terms, fixed_bytes: int) -> None:
        limit = (self.budget_bytes - fixed_bytes) / self.unit
        if limit < 0 and run.first and not any(a < 0 for _, a in terms):
            name = self.graph.operators[run.operator].name
            self.hopeless = f"what must be in memory at operator {name} is larger than the budget"
        if any(a for _, a in terms):
            self.program.at_most([(used, 1.0), *((c, a / self.unit) for c, a in terms)], limit)
        elif limit >= 0:
            self.program.upper[used] = min(self.program.upper[used], limit)
        else:
            self.program.at_most([(used, 1.0)], limit)

    def _reuse(self, s: int, run: Run, behind: dict[tuple[int, int], int | None]) -> Terms:
        """Minus the bytes that a run takes over, if the source is not needed behind it and surely of its program."""
        graph, operator = self.graph, self.graph.operators[run.operator]
        source = operator.in_place[0][0] if operator.in_place else None
        if source is None or not self.model.flexible[source] or not self._same_program(s, run, source):
            return []
        taken = self.program.add_column(integer=False)
        if run.column != self.model.one:
            self._at_least_all([taken], run.column)
        need = behind.get((source, run.operator))
        if need is not None:
            self.program.at_most([(taken, 1.0), (need, 1.0)], 1.0)
        return [(taken, -float(graph.values[source].size_bytes))]

    def _same_program(self, s: int, run: Run, source: int) -> bool:
        phases = [self.graph.operators[i].phase for i in (self.graph.values[source].producer, run.operator)]
        return self.model.ends[s] <= self.graph.last_forward + 1 or (phases[0] == phases[1] != "forward")
