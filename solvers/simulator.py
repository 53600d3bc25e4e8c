"""The judge: replays any schedule of any solver on its graph, and counts every byte.

It shares no code with the solvers, knows no solver, and trusts nothing: an input that is absent, a free of what is
not there, a value made while it is still in memory, an operator that must not run twice, an output that is missing at
the end are all refused with the step at which they happen. So are first executions in an order that somebody could
tell: random numbers drawn in another order, buffers changed, gradients delivered, or the loss computed in another one.
So is a schedule that holds a value across the turn from forward to backward which the graph says must be released.

Memory is counted in two regimes. In the *first* micro-batch the gradients are born during the backward phase and
stay. In a *later* micro-batch (gradient accumulation) `.grad` is there from the start, and each new gradient lives
only until it is added to it. The peak of a schedule is the worse of the two where the graph asks for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graph_capture.graph import Graph
from solvers.schedule import Compute, Schedule

Regime = Literal["first", "later"]


class ScheduleError(ValueError):
    """A schedule is not legal on its graph; the message names the step."""


@dataclass(frozen=True)
class Simulation:
    """What a schedule costs.

    **Fields:**

    - `first_peak_bytes`, `later_peak_bytes`: peak of a first and of a later micro-batch, resident memory included.
    - `peak_bytes`: the peak that a budget must cover; the worse of the two if the graph accumulates gradients.
    - `seconds`, `flops`: of the whole step; `recomputed_seconds`, `recomputed_flops`: of the repeated executions.
    - `timeline_bytes`: bytes alive while each step's operator runs (workspace included), one entry per execution, in
      the regime that binds.
    - `peak_position`: index of the execution at which the peak occurs.
    """

    peak_bytes: int
    first_peak_bytes: int
    later_peak_bytes: int
    seconds: float
    recomputed_seconds: float
    flops: int
    recomputed_flops: int
    timeline_bytes: tuple[int, ...]
    peak_position: int

    @property
    def regime(self) -> Regime:
        """The regime in which the peak occurs."""
        return "first" if self.peak_bytes == self.first_peak_bytes else "later"


def simulate(graph: Graph, schedule: Schedule) -> Simulation:
    """Replay `schedule` on `graph`; raises :class:`ScheduleError` if it is not legal."""
    first = _Replay(graph, schedule, "first")
    later = _Replay(graph, schedule, "later")
    binding = max(first, later, key=lambda r: r.peak) if graph.gradient_accumulation else first
    if first.peak >= binding.peak:
        binding = first
    recomputed = [graph.operators[i] for i in first.recomputed]
    recomputed_seconds = sum(o.seconds for o in recomputed)
    recomputed_flops = sum(o.flops for o in recomputed)
    return Simulation(
        peak_bytes=binding.peak,
        first_peak_bytes=first.peak,
        later_peak_bytes=later.peak,
        seconds=graph.step_seconds + recomputed_seconds,
        recomputed_seconds=recomputed_seconds,
        flops=graph.step_flops + recomputed_flops,
        recomputed_flops=recomputed_flops,
        timeline_bytes=tuple(binding.timeline),
        peak_position=binding.timeline.index(binding.peak) if binding.timeline else 0,
    )


def simulate_store_all(graph: Graph) -> Simulation:
    """What the step costs without recomputation, whether or not the graph has values that must be released."""
    return simulate(graph.without_released, Schedule.store_all(graph))


def timeline_of(graph: Graph, schedule: Schedule, regime: Regime) -> tuple[int, ...]:
    """Bytes alive while each execution runs, in a regime of the caller's choice."""
    return tuple(_Replay(graph, schedule, regime).timeline)


class _Replay:
    """One pass over a schedule in one regime."""

    def __init__(self, graph: Graph, schedule: Schedule, regime: Regime) -> None:
        self.graph = graph
        self.alive: dict[int, int] = {}  # value -> program in which its instance was made
        self.live = graph.resident_total_bytes + (graph.accumulated_gradient_bytes if regime == "later" else 0)
        self.peak = self.live
        self.timeline: list[int] = []
        self.recomputed: list[int] = []
        self.done: set[int] = set()
        self.regime = regime
        self.deliveries: dict[int, list[int]] = {}
        for index, value in enumerate(graph.values):
            if value.delivered_after is not None:
                self.deliveries.setdefault(value.delivered_after, []).append(index)
        self.program = 0
        self.latest: dict[str, int] = {}
        self.last_forward_step = self._last_forward_step(schedule)
        self.last_read = self._last_reads(schedule)
        self.random_until = self._random_states(schedule)
        for number, step in enumerate(schedule.steps):
            if isinstance(step, Compute):
                self._compute(number, step)
            else:
                self._free(number, step.value)
        self._finish()

    def _last_forward_step(self, schedule: Schedule) -> int:
        seen: set[int] = set()
        last = -1
        for number, step in enumerate(schedule.steps):
            if isinstance(step, Compute) and step.operator not in seen:
                seen.add(step.operator)
                if 0 <= step.operator < len(self.graph) and self.graph.operators[step.operator].phase == "forward":
                    last = number
        return last

    def _random_states(self, schedule: Schedule) -> dict[int, int]:
        """The step of the last replay of each random operator that runs more than once: its state lives until then."""
        first: set[int] = set()
        until: dict[int, int] = {}
        for number, step in enumerate(schedule.steps):
            if isinstance(step, Compute) and 0 <= step.operator < len(self.graph):
                if step.operator in first and self.graph.operators[step.operator].random_state_bytes:
                    until[step.operator] = number
                first.add(step.operator)
        return until

    def _last_reads(self, schedule: Schedule) -> dict[int, int]:
        """The last step that reads each gradient; a gradient that is read after its delivery is not released."""
        last: dict[int, int] = {}
        for number, step in enumerate(schedule.steps):
            if isinstance(step, Compute) and 0 <= step.operator < len(self.graph):
                for value in self.graph.operators[step.operator].inputs:
                    if self.graph.values[value].kind == "gradient":
                        last[value] = number
        return last

    def _program(self, number: int, index: int) -> int:
        if number <= self.last_forward_step:
            return 0
        return 1 if self.graph.operators[index].phase == "loss" else 2

    def _check_program(self, where: str, program: int, index: int) -> None:
        """Forward program, the caller's loss, backward program: none is entered again once it has been left."""
        if program == 0 and self.graph.operators[index].phase == "loss":
            raise ScheduleError(f"{where}: the caller's loss starts before the forward phase is complete")
        if program < self.program:
            raise ScheduleError(f"{where}: another operator before it interrupts the caller's loss")
        if program > 0 and self.program == 0:
            for value in self.graph.released:
                if value in self.alive:
                    raise ScheduleError(f"{where}: value {value} is held across the turn, and it must be recomputed")
        self.program = program

    def _check_order(self, where: str, index: int) -> None:
        """Operators whose mutual order is seen from outside first run in captured order."""
        operator = self.graph.operators[index]
        kinds = {
            "belong to the loss": operator.phase == "loss",
            "draw random numbers": operator.random_state_bytes > 0,
            "must not run twice": not operator.recomputable,
            "complete a gradient": index in self.deliveries,
        }
        for kind, concerned in kinds.items():
            before = self.latest.get(kind, -1)
            if concerned and before > index:
                name = self.graph.operators[before].name
                raise ScheduleError(f"{where}: both it and operator {before} ({name}) {kind}, so it must run first")
            if concerned:
                self.latest[kind] = index

    def _compute(self, number: int, step: Compute) -> None:
        graph, index = self.graph, step.operator
        if not 0 <= index < len(graph):
            raise ScheduleError(f"step {number} computes operator {index}; the graph has {len(graph)} operators")
        operator = graph.operators[index]
        where = f"step {number} (operator {index}, {operator.name})"
        program = self._program(number, index)
        again = index in self.done
        if again and not operator.recomputable:
            raise ScheduleError(f"{where}: it must not run twice ({operator.keep_reason or 'not recomputable'})")
        if program == 1 and again:
            raise ScheduleError(f"{where}: nothing can be recomputed inside of the loss, which the caller runs")
        self._check_program(where, program, index)
        for value in operator.inputs:
            if value not in self.alive:
                raise ScheduleError(f"{where}: its input value {value} is not in memory")
        if not again:
            self._check_order(where, index)
        taken = self._take_over(where, step, program)
        for value in operator.outputs:
            if value in self.alive:
                raise ScheduleError(f"{where}: its output value {value} is still in memory; free it first")
        state = operator.random_state_bytes
        if index in self.random_until and not again:
            self.live += state
        made = sum(graph.values[v].size_bytes for v in operator.outputs)
        replay = state if again else 0  # the present generator state is put aside while the old one is replayed
        instant = self.live + made - taken + operator.workspace_bytes + replay
        self.live += made - taken
        self.timeline.append(instant)
        self.peak = max(self.peak, instant)
        if step.reuses is not None:
            del self.alive[step.reuses]
        for value in operator.outputs:
            self.alive[value] = program
        if again:
            self.recomputed.append(index)
            if self.random_until.get(index) == number:
                self.live -= state
        self.done.add(index)
        if not again:
            self._deliver(where, number, index)

    def _take_over(self, where: str, step: Compute, program: int) -> int:
        if step.reuses is None:
            return 0
        operator = self.graph.operators[step.operator]
        pairs = dict(operator.in_place)
        if step.reuses not in pairs:
            raise ScheduleError(f"{where}: it cannot work in the allocation of value {step.reuses}")
        if self.graph.values[step.reuses].kind != "activation" or self.alive[step.reuses] != program:
            raise ScheduleError(f"{where}: value {step.reuses} belongs to the caller or to another program")
        size = self.graph.values[step.reuses].size_bytes
        if size != self.graph.values[pairs[step.reuses]].size_bytes:
            raise ScheduleError(f"{where}: value {step.reuses} and the output that takes it over differ in size")
        return size

    def _deliver(self, where: str, number: int, index: int) -> None:
        for value in self.deliveries.get(index, ()):
            if value not in self.alive:
                raise ScheduleError(f"{where}: gradient value {value} is due, and is not in memory")
            copy = self.graph.values[value].delivery_copy_bytes if self.regime == "first" else 0
            self.live += copy
            self.peak = max(self.peak, self.live)
            self.timeline[-1] = max(self.timeline[-1], self.live)
            # What autograd takes over as it is stays; what it copies or adds to `.grad` goes, unless it is read again.
            if (copy or self.regime == "later") and self.last_read.get(value, -1) <= number:
                self.live -= self.graph.values[value].size_bytes

    def _free(self, number: int, value: int) -> None:
        if value not in self.alive:
            raise ScheduleError(f"step {number} frees value {value}, which is not in memory")
        if self.graph.values[value].kind != "activation":
            raise ScheduleError(f"step {number} frees value {value}, a {self.graph.values[value].kind}")
        del self.alive[value]
        self.live -= self.graph.values[value].size_bytes

    def _finish(self) -> None:
        missing = [i for i in range(len(self.graph)) if i not in self.done]
        if missing:
            raise ScheduleError(f"operator {missing[0]} ({self.graph.operators[missing[0]].name}) never runs")
        for index, value in enumerate(self.graph.values):
            if value.kind != "activation" and index not in self.alive:
                raise ScheduleError(f"value {index}, a {value.kind}, is missing at the end of the step")
