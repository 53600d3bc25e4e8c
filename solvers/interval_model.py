"""Moccasin's constraint program: retention intervals on the staged timeline, for CP-SAT.

Stage j is the time up to the first execution of operator j; it has j + 1 events, one per operator that may run in it:

    operator i in stage j ≥ i runs at event j (j + 1) / 2 + i, for the first time at its last stage-event, j = i

Every operator has up to C executions c = 0, 1, …; the first is fixed at its place in the order. Every output v of
execution c has a retention interval [start(i, c), end(v, c)].

    minimise   Σ seconds(i) · active(i, c)                                                      over c ≥ 1
    cumulative Σ bytes(v) over the intervals that contain an event ≤ budget                     at every event
    cover      an active execution at s asks for each input v, made by p:  start(p, c') < s ≤ end(v, c') for some c'
    order      end(v, c) < start(i, c + 1): the next interval opens after the last

The paper posts the cover by reservoir constraints; here it is a choice literal per (execution, input, c').

CP-SAT is integer only: bytes are rounded *up* to units, seconds *down* to parts of a step. Further details are counted
on the safe side of :mod:`solvers.simulator`: nothing is taken over in place, a gradient that somebody reads stays to
the end, its delivery copy lives beside it. So the program is a *restriction*: what it finds fits, and its bound
speaks of its own class alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from graph_capture.graph import Graph
from solvers.backends import backend
from solvers.structure import repeatable

COST_SCALE = 10**9  # parts of the store-all step
_MEMORY_UNITS = 10**6  # at most so many units in the budget


def event(operator: int, stage: int) -> int:
    """The event at which `operator` may run in `stage`."""
    return stage * (stage + 1) // 2 + operator


class IntervalModel:
    """The program of a graph and a budget; `model` is complete after construction.

    **Fields:**

    - `starts`, `active`: per operator and execution the event and whether it takes place.
    - `ends`: per value and execution the end of its retention.
    """

    def __init__(self, graph: Graph, budget_bytes: int, intervals: int) -> None:
        with backend("ortools"):
            from ortools.sat.python import cp_model

        self.cp: Any = cp_model
        self.model: Any = cp_model.CpModel()
        self.graph = graph
        self.last = event(len(graph) - 1, len(graph) - 1)
        self.unit = max(1, budget_bytes // _MEMORY_UNITS)
        self.starts: list[list[Any]] = []
        self.active: list[list[Any]] = []
        self.ends: list[list[Any]] = [[] for _ in graph.values]
        for index in range(len(graph)):
            self._add_executions(index, intervals)
        for index in range(len(graph)):
            self._add_covers(index)
        self._add_memory(budget_bytes - graph.resident_total_bytes, later=False)
        if graph.gradient_accumulation:
            later = budget_bytes - graph.resident_total_bytes - graph.accumulated_gradient_bytes
            self._add_memory(later, later=True)
        step_seconds = graph.step_seconds or 1.0
        costs = [int(operator.seconds / step_seconds * COST_SCALE) for operator in graph.operators]
        self.model.minimize(sum(costs[i] * a for i, row in enumerate(self.active) for a in row[1:]))

    def order(self, solver: Any) -> list[int]:
        """The executions of the solution that the engine has."""
        runs = [
            (solver.value(start), index)
            for index, (starts, active) in enumerate(zip(self.starts, self.active, strict=True))
            for start, is_active in zip(starts, active, strict=True)
            if solver.boolean_value(is_active)
        ]
        return [index for _, index in sorted(runs)]

    def _add_executions(self, index: int, intervals: int) -> None:
        graph, model = self.graph, self.model
        first = event(index, index)
        starts: list[Any] = [model.new_constant(first)]
        active: list[Any] = [model.new_constant(1)]
        stages = [j for j in range(index + 1, len(graph)) if graph.operators[j].phase != "loss"]
        again = self.cp.Domain.from_values([event(index, j) for j in stages])
        for c in range(1, intervals if stages and repeatable(graph, index) else 1):
            starts.append(model.new_int_var_from_domain(again, f"start {index} {c}"))
            active.append(model.new_bool_var(f"active {index} {c}"))
            model.add_implication(active[c], active[c - 1])
            model.add(starts[c] == event(index, stages[-1])).only_enforce_if(~active[c])
        for v in graph.operators[index].outputs:
            lowest = first if graph.values[v].kind == "activation" else self.last
            self.ends[v] = [model.new_int_var(lowest, self.last, f"end {v} {c}") for c in range(len(starts))]
            for c in range(1, len(starts)):
                model.add(self.ends[v][c - 1] < starts[c]).only_enforce_if(active[c])
        self.starts.append(starts)
        self.active.append(active)

    def _add_covers(self, index: int) -> None:
        model = self.model
        for start, active in zip(self.starts[index], self.active[index], strict=True):
            for v in self.graph.operators[index].inputs:
                producer = self.graph.values[v].producer
                chosen: list[Any] = []
                for c, made in enumerate(self.starts[producer]):
                    literal = model.new_bool_var("")
                    model.add_implication(literal, self.active[producer][c])
                    model.add(made < start).only_enforce_if(literal)
                    model.add(start <= self.ends[v][c]).only_enforce_if(literal)
                    chosen.append(literal)
                model.add_bool_or([*chosen, ~active])

    def _add_memory(self, capacity_bytes: int, *, later: bool) -> None:
        """The cumulative constraint of one regime of micro-batches."""
        intervals: list[Any] = []
        demands: list[int] = []
        for start, stop, active, size_bytes in (*self._retentions(later), *self._scratch()):
            if size_bytes:
                length = self.model.new_int_var(1, self.last + 1, "")
                interval = self.model.new_optional_interval_var(start, length, stop + 1, active, "")
                intervals.append(interval)
                demands.append(-(-size_bytes // self.unit))
        self.model.add_cumulative(intervals, demands, max(0, capacity_bytes // self.unit))

    def _retentions(self, later: bool) -> Iterator[tuple[Any, Any, Any, int]]:
        for v, value in enumerate(self.graph.values):
            if value.delivered_after is None or self.graph.uses[v]:
                row = zip(self.starts[value.producer], self.ends[v], self.active[value.producer], strict=True)
                yield from ((start, end, active, value.size_bytes) for start, end, active in row)
            else:  # a gradient that nobody reads: it stays, or is added to what is there, or a copy stays
                delivery = event(value.delivered_after, value.delivered_after)
                stays = not later and not value.delivery_copy_bytes
                end = self.last if stays else delivery
                yield self.starts[value.producer][0], end, self.active[value.producer][0], value.size_bytes
            if value.delivered_after is not None and value.delivery_copy_bytes and not later:
                delivery = event(value.delivered_after, value.delivered_after)
                yield delivery, self.last, self.active[value.producer][0], value.delivery_copy_bytes

    def _scratch(self) -> Iterator[tuple[Any, Any, Any, int]]:
        """Workspace; the random state from the first execution to the last, and the one put aside for a replay."""
        for index, operator in enumerate(self.graph.operators):
            starts, active = self.starts[index], self.active[index]
            for c, start in enumerate(starts):
                replay = operator.random_state_bytes if c else 0
                yield start, start, active[c], operator.workspace_bytes + replay
            if operator.random_state_bytes and len(starts) > 1:
                until = self.model.new_int_var(event(index, index), self.last, "")
                for c in range(1, len(starts)):
                    self.model.add(until >= starts[c]).only_enforce_if(active[c])
                yield starts[0], until, active[1], operator.random_state_bytes
