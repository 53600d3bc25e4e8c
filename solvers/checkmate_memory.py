"""The memory rows of Checkmate's program: bytes alive while operator k runs in stage t, for every t and k.

:mod:`solvers.checkmate_model` has the formulation; here are its columns U[t,k] and N[t,v,k], and what the simulator
counts beyond the paper. The rows of positions at which nothing runs are there as well; they ask for nothing more,
since what is alive between two executions was alive during the one before.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from solvers.structure import repeatable

if TYPE_CHECKING:
    from solvers.checkmate_model import StagedModel, Terms


@dataclass(frozen=True)
class Regime:
    """What a micro-batch has in memory in a stage whatever the columns S and R say."""

    name: str
    fixed_bytes: int
    terms: tuple[tuple[int, float], ...]


class MemoryRows:
    """Adds the memory rows to a model. `hopeless` says what exceeds the budget by itself, if something does."""

    def __init__(self, model: StagedModel, budget_bytes: float) -> None:
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
        self.states: dict[tuple[int, int], int] = {}
        self.fresh: dict[tuple[int, int], int] = {}
        self._add_random_states()
        self.retained = self._add_retained_gradients()
        for stage in range(len(self.graph)):
            self._add_stage(stage)

    def _scaled(self, size_bytes: float) -> float:
        return size_bytes / self.unit

    def _at_least_all(self, columns: list[int | None], upper: int) -> None:
        """Column `upper` ≥ each of `columns`."""
        for column in columns:
            if column is not None:
                self.program.at_least([(upper, 1.0), (column, -1.0)], 0.0)

    def _add_random_states(self) -> None:
        """H[t,i] = 1: the random state of operator i is replayed in stage t or later."""
        for i, operator in enumerate(self.graph.operators):
            if not operator.random_state_bytes or not repeatable(self.graph, i):
                continue
            for stage in range(len(self.graph) - 1, i, -1):
                column = self.states[stage, i] = self.program.add_column(integer=False)
                self._at_least_all([self.states.get((stage + 1, i)), self.model.run(stage, i)], column)

    def _add_retained_gradients(self) -> dict[int, int]:
        """For each gradient the column that is 1 if it is read after its delivery; `one` if that is certain."""
        retained: dict[int, int] = {}
        for v, value in enumerate(self.graph.values):
            after, readers = value.delivered_after, self.graph.uses[v]
            if after is None or not readers:
                continue
            if max(readers) > after:
                retained[v] = self.model.one
                continue
            runs = [self.model.recompute.get((t, r)) for r in readers for t in range(after + 1, len(self.graph))]
            if any(run is not None for run in runs):
                retained[v] = self.program.add_column(integer=False)
                self._at_least_all(runs, retained[v])
        return retained

    def _regimes(self, stage: int) -> list[Regime]:
        """The first and, if it counts, a later micro-batch when `stage` begins."""
        graph = self.graph
        made = [v for v in graph.values if v.kind != "activation" and v.producer < stage]
        first = later = graph.resident_total_bytes + sum(v.size_bytes for v in made)
        later += graph.accumulated_gradient_bytes
        first_terms: Terms = []
        later_terms: Terms = []
        for v, value in enumerate(graph.values):
            if value.delivered_after is None or value.delivered_after >= stage:
                continue
            back = [(self.retained[v], self._scaled(value.size_bytes))] if v in self.retained else []
            later -= value.size_bytes
            later_terms += back
            if value.delivery_copy_bytes:
                first += value.delivery_copy_bytes - value.size_bytes
                first_terms += back
        regimes = [Regime("first", first, tuple(first_terms))]
        if graph.gradient_accumulation:
            regimes.append(Regime("later", later, tuple(later_terms)))
        return regimes

    def _add_stage(self, stage: int) -> None:
        """U[t,k] for all k, and the rows that hold it within the budget."""
        graph, model = self.graph, self.model
        changes: list[dict[int, float]] = [defaultdict(float) for _ in range(stage + 2)]
        needs: dict[int, dict[int, int | None]] = {}
        for value in model.dynamic:
            if graph.values[value].producer <= stage:
                needs[value] = self._add_value(stage, value, changes)
        for v, value in enumerate(graph.values):
            if value.kind != "activation" and value.producer == stage:
                changes[stage][model.one] += self._scaled(graph.values[v].size_bytes)
        for i, operator in enumerate(graph.operators[: stage + 1]):
            if operator.random_state_bytes:
                self._add_state_bytes(stage, i, changes)
        regimes = self._regimes(stage)
        used: int | None = None
        for k in range(stage + 1):
            terms: Terms = [(c, a) for c, a in changes[k].items() if a]
            if terms or used is None:
                before: Terms = [] if used is None else [(used, 1.0)]
                used = self.program.add_column(upper=self.most, integer=False)
                self.program.add_row([*before, *terms, (used, -1.0)], 0.0, 0.0)
                self._limit(stage, k, used, regimes, needs)
            elif model.run(stage, k) is not None:
                self._limit(stage, k, used, regimes, needs)

    def _add_value(self, stage: int, value: int, changes: list[dict[int, float]]) -> dict[int, int | None]:
        """N[t,v,k], and the bytes of `value` over the stage; returns the column of N behind each of its readers."""
        graph, model = self.graph, self.model
        producer, size = graph.values[value].producer, self._scaled(graph.values[value].size_bytes)
        kept, made = model.keep.get((stage, value)), model.run(stage, producer)
        if kept is None and made is None:
            return {}
        need = model.keep.get((stage + 1, value))
        behind: dict[int, int | None] = {}
        for reader in reversed(graph.uses[value]):
            run = model.run(stage, reader) if reader <= stage else None
            if run is None:
                continue
            behind[reader] = need
            at: int = run
            if need is not None and run != model.one:
                at = self.program.add_column(integer=False)
                self._at_least_all([run, need], at)
            if need is not None:
                changes[reader + 1][need] += size
            changes[reader + 1][at] -= size
            need = at
        for column, position in ((kept, 0), (made, producer)):
            if column is not None:
                changes[position][column] += size
                changes[producer + 1][column] -= size
        if need is not None:
            changes[producer + 1][need] += size
        return behind

    def _add_state_bytes(self, stage: int, operator: int, changes: list[dict[int, float]]) -> None:
        """The saved random state, there for as long as a replay is still to come."""
        size = self._scaled(self.graph.operators[operator].random_state_bytes)
        now, later = self.states.get((stage, operator)), self.states.get((stage + 1, operator))
        if stage == operator:
            if later is not None:
                changes[operator][later] += size
            return
        if now is not None:
            changes[0][now] += size
            changes[operator + 1][now] -= size
        if later is not None:
            changes[operator + 1][later] += size

    def _limit(
        self, stage: int, k: int, used: int, regimes: list[Regime], needs: dict[int, dict[int, int | None]]
    ) -> None:
        """Hold U[t,k], with what exists only while k runs, within the budget."""
        operator, run = self.graph.operators[k], self.model.run(stage, k)
        extra: Terms = []
        if run is not None:
            replayed = operator.random_state_bytes if stage != k else 0
            extra = [(run, self._scaled(operator.workspace_bytes + replayed))]
        reuse = self._reuse(stage, k, needs) if run is not None else []
        for regime in regimes:
            self._add_limit(stage, used, [*extra, *reuse, *regime.terms], regime.fixed_bytes)
            if stage == k and regime.name == "first":
                self._add_deliveries(stage, used, reuse, regime)

    def _add_deliveries(self, stage: int, used: int, reuse: Terms, regime: Regime) -> None:
        """Gradients that are handed over after operator `stage`: the copy stands beside its original for a moment."""
        fixed, terms = regime.fixed_bytes, [*reuse, *regime.terms]
        for v, value in enumerate(self.graph.values):
            if value.delivered_after == stage and value.delivery_copy_bytes:
                fixed += value.delivery_copy_bytes
                self._add_limit(stage, used, terms, fixed)
                fixed -= value.size_bytes
                if v in self.retained:
                    terms = [*terms, (self.retained[v], self._scaled(value.size_bytes))]

    def _add_limit(self, stage: int, used: int, terms: Terms, fixed_bytes: int) -> None:
        limit = self._scaled(self.budget_bytes - fixed_bytes)
        if limit < 0:
            name = self.graph.operators[stage].name
            self.hopeless = f"what must be in memory at operator {name} is larger than the budget"
            return
        if any(coefficient for _, coefficient in terms):
            self.program.at_most([(used, 1.0), *terms], limit)
        else:
            self.program.upper[used] = min(self.program.upper[used], limit)

    def _reuse(self, stage: int, k: int, needs: dict[int, dict[int, int | None]]) -> Terms:
        """Minus the bytes that operator k takes over, if the source is needed no more and is of this program."""
        operator = self.graph.operators[k]
        run = self.model.run(stage, k)
        source = operator.in_place[0][0] if operator.in_place else None
        if source is None or run is None or self.graph.values[source].kind != "activation":
            return []
        size = self._scaled(self.graph.values[source].size_bytes)
        made_here = self._made_in_program(stage, source)
        if made_here == [] or not size:
            return []
        taken = self.program.add_column(integer=False)
        self._at_least_all([taken], run)
        need = needs[source].get(k)
        if need is not None:
            self.program.at_most([(taken, 1.0), (need, 1.0)], 1.0)
        if made_here is not None:
            self.program.at_least([*made_here, (taken, -1.0)], 0.0)
        return [(taken, -size)]

    def _made_in_program(self, stage: int, value: int) -> Terms | None:
        """Columns whose sum is 1 if the instance of `value` is of the program of `stage`; `None` if it always is."""
        phase = self.graph.operators[self.graph.values[value].producer].phase
        if stage <= self.graph.last_forward:
            return None
        if self.graph.operators[stage].phase == "loss" or phase != "forward":
            return None if phase == self.graph.operators[stage].phase else []
        again = self.model.recompute.get((stage, self.graph.values[value].producer))
        columns = [again, self._fresh(stage, value)]
        return [(column, 1.0) for column in columns if column is not None]

    def _fresh(self, stage: int, value: int) -> int | None:
        """Whether a value of the forward phase that is kept into `stage` was made again in the backward program."""
        first = next((t for t, o in enumerate(self.graph.operators) if o.phase == "backward"), len(self.graph))
        kept = self.model.keep.get((stage, value))
        if stage <= first or kept is None:
            return None
        if (stage, value) not in self.fresh:
            before = self._fresh(stage - 1, value)
            again = self.model.recompute.get((stage - 1, self.graph.values[value].producer))
            column = self.fresh[stage, value] = self.program.add_column(integer=False)
            self._at_least_all([column], kept)
            self.program.at_least([*((c, 1.0) for c in (before, again) if c is not None), (column, -1.0)], 0.0)
        return self.fresh[stage, value]
