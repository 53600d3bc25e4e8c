"""A second interpreter of schedules, in exact arithmetic; it shares nothing with the simulator but the words.

The rules (bytes alive, in a *first* micro-batch and in a *later* one that finds `.grad` tensors there):

- resident memory is always there, in a later micro-batch the accumulated gradients too;
- a value is alive from the execution that makes it until it is freed, or taken over in place by an output;
- an operator's workspace exists while it runs; an operator that draws random numbers and runs again has its state
  saved from its first run to its last replay, and a replay puts one more state aside while it runs;
- a gradient is handed over after the first run of its operator. First micro-batch: if it must be copied, the copy
  comes into being beside it and stays. Later: it is added to `.grad`. In both cases the original goes, unless an
  execution still reads it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from graph_capture.graph import Graph, Operator
from planner.errors import CertificateError

FORWARD, LOSS, BACKWARD = range(3)

ScheduleRow = int | tuple[int, int]
"""`o` runs operator o, `(o, v)` runs it in the allocation of value v, `-1 - v` frees value v."""


@dataclass(frozen=True)
class Replayed:
    """Seconds of recomputation (exact), the peaks of both regimes, and whether first runs keep the captured order."""

    recomputed_seconds: Fraction
    first_peak_bytes: int
    later_peak_bytes: int
    in_captured_order: bool


def replay(graph: Graph, rows: tuple[ScheduleRow, ...]) -> Replayed:
    """Run through a schedule; raises :class:`~planner.errors.CertificateError` at the first step that is not legal."""
    machine = _Machine(graph, rows)
    for number, row in enumerate(rows):
        if isinstance(row, int) and row < 0:
            machine.free(number, -1 - row)
        else:
            machine.run(number, *(row if isinstance(row, tuple) else (row, None)))
    machine.check_end()
    return Replayed(
        recomputed_seconds=machine.recomputed_seconds,
        first_peak_bytes=machine.peaks[0],
        later_peak_bytes=machine.peaks[1],
        in_captured_order=machine.first_runs == sorted(machine.first_runs),
    )


class _Machine:
    """What is in memory, twice: index 0 counts a first micro-batch, index 1 a later one."""

    def __init__(self, graph: Graph, rows: tuple[ScheduleRow, ...]) -> None:
        self.graph = graph
        runs = [(n, r if isinstance(r, int) else r[0]) for n, r in enumerate(rows) if not isinstance(r, int) or r >= 0]
        for number, index in runs:
            if index >= len(graph):
                raise CertificateError(f"the schedule's step {number} runs operator {index} of {len(graph)}")
        self.remaining = Counter(index for _, index in runs)
        self.replayed = {index for index, count in self.remaining.items() if count > 1}
        self.last_read: dict[int, int] = {v: n for n, index in runs for v in graph.operators[index].inputs}
        firsts: dict[int, int] = {}
        for number, index in runs:
            firsts.setdefault(index, number)
        forward = [number for index, number in firsts.items() if graph.operators[index].phase == "forward"]
        self.forward_ends = max(forward, default=-1)
        self.due: dict[int, list[int]] = {}
        for v, value in enumerate(graph.values):
            if value.delivered_after is not None:
                self.due.setdefault(value.delivered_after, []).append(v)
        resident = sum(graph.resident_bytes.values())
        self.live = [resident, resident + graph.accumulated_gradient_bytes]
        self.peaks = list(self.live)
        self.program_of: dict[int, int] = {}  # of each value in memory: where its instance was made
        self.program = FORWARD
        self.first_runs: list[int] = []
        self.started: set[int] = set()
        self.recomputed_seconds = Fraction(0)

    def _size(self, value: int) -> int:
        return self.graph.values[value].size_bytes

    def _add(self, size_bytes: int) -> None:
        self.live = [live + size_bytes for live in self.live]

    def _touch(self, extra_bytes: int) -> None:
        self.peaks = [max(peak, live + extra_bytes) for peak, live in zip(self.peaks, self.live, strict=True)]

    def run(self, number: int, index: int, reuses: int | None) -> None:
        """Execute an operator, and hand over the gradients that are due after its first run."""
        operator = self.graph.operators[index]
        again = index in self.started
        self._check_legal(number, index, operator, again)
        taken = 0
        if reuses is not None:
            self._check_reuse(number, operator, reuses)
            taken = self._size(reuses)
        for v in operator.outputs:
            if v in self.program_of:
                raise CertificateError(f"the schedule's step {number} makes value {v}, which is still in memory")
        state = operator.random_state_bytes if index in self.replayed else 0
        if not again:
            self._add(state)
        self._add(sum(map(self._size, operator.outputs)) - taken)
        self._touch(operator.workspace_bytes + (state if again else 0))
        if reuses is not None:
            del self.program_of[reuses]
        self.program_of.update(dict.fromkeys(operator.outputs, self.program))
        self.remaining[index] -= 1
        if not again:
            self.started.add(index)
            self.first_runs.append(index)
            self._deliver(number, index)
            return
        self.recomputed_seconds += Fraction(operator.seconds)
        if not self.remaining[index]:
            self._add(-state)

    def _check_legal(self, number: int, index: int, operator: Operator, again: bool) -> None:
        """The forward program, the caller's loss, the backward program: one after the other, the loss uninterrupted."""
        in_loss = operator.phase == "loss"
        program = FORWARD if number <= self.forward_ends else LOSS if in_loss else BACKWARD
        if again and (not operator.recomputable or program == LOSS):
            raise CertificateError(f"the schedule's step {number} runs {operator.name} again, which must run once")
        if program < self.program or (program == FORWARD and in_loss):
            raise CertificateError(f"the schedule's step {number} runs {operator.name} in the middle of another phase")
        if program != FORWARD and self.program == FORWARD:
            for v in self.graph.released:
                if v in self.program_of:
                    raise CertificateError(f"the schedule holds value {v} across the turn, and it must be recomputed")
        self.program = program
        for v in operator.inputs:
            if v not in self.program_of:
                raise CertificateError(f"the schedule's step {number} reads value {v}, which is not in memory")

    def _check_reuse(self, number: int, operator: Operator, source: int) -> None:
        targets = [target for s, target in operator.in_place if s == source]
        ours = bool(targets) and self.graph.values[source].kind == "activation"
        if not ours or self.program_of[source] != self.program or self._size(source) != self._size(targets[-1]):
            raise CertificateError(f"the schedule's step {number} takes over value {source}, which it cannot")

    def _deliver(self, number: int, index: int) -> None:
        for v in self.due.get(index, ()):
            if v not in self.program_of:
                raise CertificateError(f"the schedule's step {number} must hand over value {v}, which is not in memory")
            copy = self.graph.values[v].delivery_copy_bytes
            self.live[0] += copy
            self._touch(0)
            if self.last_read.get(v, -1) <= number:
                self.live[0] -= self._size(v) if copy else 0
                self.live[1] -= self._size(v)

    def free(self, number: int, value: int) -> None:
        """Release an activation."""
        if value not in self.program_of:
            raise CertificateError(f"the schedule's step {number} frees value {value}, which is not in memory")
        if self.graph.values[value].kind != "activation":
            kind = self.graph.values[value].kind
            raise CertificateError(f"the schedule's step {number} frees value {value}, which is a {kind}")
        del self.program_of[value]
        self._add(-self._size(value))

    def check_end(self) -> None:
        """Everything has run, and whatever belongs to the caller is there."""
        if len(self.started) < len(self.graph):
            missing = next(i for i in range(len(self.graph)) if i not in self.started)
            raise CertificateError(f"the schedule never runs operator {missing} ({self.graph.operators[missing].name})")
        for v, value in enumerate(self.graph.values):
            if value.kind != "activation" and v not in self.program_of:
                raise CertificateError(f"value {v}, a {value.kind}, is missing at the end of the schedule")
