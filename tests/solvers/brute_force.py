"""The exact optimum of the *ordered* and of the *staged* class on tiny graphs, by Dijkstra's algorithm over states.

A state is what is in memory between two executions; its successors run the next operator in captured order, recompute
an operator, or free a value. It follows the memory semantics of :mod:`solvers.simulator` and shares no code with it
or with a solver, so that the two check one another. Exponential: about 14 operators.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from graph_capture.graph import Graph
from solvers.schedule import Compute, Free, Schedule, Step


@dataclass(frozen=True, slots=True)
class State:
    """What is in memory between two executions.

    `fresh`: values of the forward phase whose present instance was made in the backward program. `held`: operators
    whose random state is saved. `retained`: gradients that outlive their delivery because somebody reads them later.
    `stage`: the first operator that may still be recomputed in this stage (staged class only).
    """

    done: int = 0
    alive: int = 0
    fresh: int = 0
    held: int = 0
    retained: int = 0
    stage: int = 0


_ANSWERS: dict[tuple[str, bool, int], tuple[float, Schedule | None]] = {}


@dataclass(frozen=True)
class BruteForce:
    """Exhaustive search on `graph`; `staged` restricts it to Checkmate's class."""

    graph: Graph
    staged: bool = False

    def optimum_seconds(self, budget_bytes: int) -> float:
        """The fewest seconds of recomputation within the budget; `inf` if nothing fits."""
        return self.optimum(budget_bytes)[0]

    def optimum(self, budget_bytes: int) -> tuple[float, Schedule | None]:
        """The optimum and a schedule that attains it; searched once, however many solvers are held against it."""
        question = (self._text, self.staged, budget_bytes)
        if question not in _ANSWERS:
            _ANSWERS[question] = self._search(budget_bytes)
        return _ANSWERS[question]

    @cached_property
    def _text(self) -> str:
        """All that there is to know of the graph, as text."""
        return json.dumps(self.graph.to_dict())

    def _search(self, budget_bytes: int) -> tuple[float, Schedule | None]:
        start = State()
        if self._live(start) > budget_bytes:
            return math.inf, None
        best = {start: 0.0}
        parents: dict[State, tuple[State, Step]] = {}
        queue: list[tuple[float, int, State]] = [(0.0, 0, start)]
        ticket = itertools.count(1)
        while queue:
            cost, _, state = heapq.heappop(queue)
            if cost > best[state]:
                continue
            if state.done == len(self.graph):
                return cost, _trace_back(parents, state)
            for price, step, successor in self._successors(state, budget_bytes):
                if cost + price < best.get(successor, math.inf):
                    best[successor] = cost + price
                    parents[successor] = (state, step)
                    heapq.heappush(queue, (cost + price, next(ticket), successor))
        return math.inf, None

    def overhead(self, budget_bytes: int) -> float:
        """The optimum as a fraction of the store-all step."""
        seconds = self.optimum_seconds(budget_bytes)
        return seconds / self.graph.step_seconds if self.graph.step_seconds else seconds

    @cached_property
    def _outputs(self) -> list[int]:
        return [sum(1 << v for v in o.outputs) for o in self.graph.operators]

    @cached_property
    def _inputs(self) -> list[int]:
        return [sum(1 << v for v in o.inputs) for o in self.graph.operators]

    @cached_property
    def _deliveries(self) -> dict[int, list[int]]:
        due: dict[int, list[int]] = {}
        for index, value in enumerate(self.graph.values):
            if value.delivered_after is not None:
                due.setdefault(value.delivered_after, []).append(index)
        return due

    def _successors(self, state: State, budget: int) -> Iterator[tuple[float, Step, State]]:
        for v, value in enumerate(self.graph.values):
            if state.alive >> v & 1 and value.kind == "activation":
                yield 0.0, Free(v), replace(state, alive=state.alive & ~(1 << v), fresh=state.fresh & ~(1 << v))
        yield from ((0.0, step, s) for step, s in self._run(state, state.done, False, budget))
        following = self.graph.operators[state.done].phase
        if following == "loss" and state.done > self.graph.last_forward:
            return
        for index in range(state.stage if self.staged else 0, state.done):
            operator = self.graph.operators[index]
            state_lost = operator.random_state_bytes > 0 and not state.held >> index & 1
            if operator.recomputable and operator.phase != "loss" and not state_lost:
                yield from ((operator.seconds, step, s) for step, s in self._run(state, index, True, budget))

    def _program(self, state: State, index: int) -> int:
        if state.done <= self.graph.last_forward:
            return 0
        return 1 if self.graph.operators[index].phase == "loss" else 2

    def _program_of_value(self, state: State, value: int) -> int:
        if state.fresh >> value & 1:
            return 2
        return {"forward": 0, "loss": 1, "backward": 2}[self.graph.operators[self.graph.values[value].producer].phase]

    def _run(self, state: State, index: int, again: bool, budget: int) -> Iterator[tuple[Step, State]]:
        operator, values = self.graph.operators[index], self.graph.values
        if self._inputs[index] & ~state.alive or self._outputs[index] & state.alive:
            return
        if self._inputs[index] & self._released(state):
            return
        at_turn = (
            not again and state.done == self.graph.last_forward + 1
        )  # the first step behind it, if there is a loss
        if at_turn and any(state.alive >> v & 1 for v in self.graph.released):
            return
        program = self._program(state, index)
        taken_choices: list[int | None] = [None]
        for source, _ in operator.in_place:
            if values[source].kind == "activation" and self._program_of_value(state, source) == program:
                taken_choices.append(source)
        random = operator.random_state_bytes
        holds = (False, True) if random and not again and operator.recomputable else (False,)
        for taken, hold in itertools.product(taken_choices, holds):
            alive = state.alive | self._outputs[index]
            fresh = state.fresh & ~self._outputs[index]
            if program == 2 and operator.phase == "forward":
                fresh |= self._outputs[index]
            if taken is not None:
                alive, fresh = alive & ~(1 << taken), fresh & ~(1 << taken)
            held = state.held | (1 << index if hold else 0)
            during = replace(state, alive=alive, fresh=fresh, held=held, stage=index + 1)
            scratch = operator.workspace_bytes + (random if again else 0)
            if self._live(during) + scratch > budget:
                continue
            if again:
                yield Compute(index, taken), during
                if random:
                    yield Compute(index, taken), replace(during, held=held & ~(1 << index))
            else:
                yield from ((Compute(index, taken), s) for s in self._delivered(during, index, budget))

    def _delivered(self, state: State, index: int, budget: int) -> Iterator[State]:
        """Hand the gradients over that are due after operator `index`, one by one."""
        due = self._deliveries.get(index, [])
        for retained in itertools.product(*(self._retentions(value, index) for value in due)):
            after = replace(state, done=index + 1, stage=0, retained=state.retained | sum(retained))
            live = self._live_first(state)
            fits = True
            for value in due:
                copy, size = self.graph.values[value].delivery_copy_bytes, self.graph.values[value].size_bytes
                live += copy
                fits = fits and live <= budget
                live -= size if copy and not after.retained >> value & 1 else 0
            if fits:
                yield after

    def _retentions(self, value: int, index: int) -> tuple[int, ...]:
        """Whether a gradient outlives its delivery: if somebody reads it later. 0 or its bit, or both."""
        readers = self.graph.uses[value]
        if readers and max(readers) > index:
            return (1 << value,)
        return (0, 1 << value) if any(self.graph.operators[r].recomputable for r in readers) else (0,)

    def _released(self, state: State) -> int:
        """The gradients that were handed over and are not there any more, in either regime."""
        gone = sum(sum(1 << v for v in due) for after, due in self._deliveries.items() if after < state.done)
        gone &= ~state.retained
        if self.graph.gradient_accumulation:
            return gone
        return sum(1 << i for i, v in enumerate(self.graph.values) if gone >> i & 1 and v.delivery_copy_bytes)

    def _live_first(self, state: State) -> int:
        graph = self.graph
        live = graph.resident_total_bytes
        live += sum(v.size_bytes for i, v in enumerate(graph.values) if state.alive >> i & 1)
        live += sum(o.random_state_bytes for i, o in enumerate(graph.operators) if state.held >> i & 1)
        for i, v in enumerate(graph.values):
            if v.delivered_after is not None and v.delivered_after < state.done and v.delivery_copy_bytes:
                live += v.delivery_copy_bytes - (0 if state.retained >> i & 1 else v.size_bytes)
        return live

    def _live(self, state: State) -> int:
        """Bytes in memory in the worse of the regimes that count."""
        graph, first = self.graph, self._live_first(state)
        if not graph.gradient_accumulation:
            return first
        later = graph.resident_total_bytes + graph.accumulated_gradient_bytes
        later += sum(o.random_state_bytes for i, o in enumerate(graph.operators) if state.held >> i & 1)
        gone = self._released(state)
        later += sum(v.size_bytes for i, v in enumerate(graph.values) if state.alive >> i & 1 and not gone >> i & 1)
        return max(first, later)


def _trace_back(parents: dict[State, tuple[State, Step]], state: State) -> Schedule:
    steps: list[Step] = []
    while state in parents:
        state, step = parents[state]
        steps.append(step)
    return Schedule(tuple(reversed(steps)))


def budgets_of(graph: Graph, floor_bytes: int, peak_bytes: int, count: int = 4) -> list[int]:
    """Budgets from the floor to the store-all peak, both included."""
    steps = max(1, count - 1)
    return sorted({floor_bytes + (peak_bytes - floor_bytes) * i // steps for i in range(count)})
