"""A schedule: the exact sequence of operator executions and frees of one training step.

Solvers decide an *order* (operator indices, recomputed ones several times); :meth:`Schedule.from_order` turns it into
a schedule by freeing every instance of a value right after its last use, and by letting an operator that can work in
place take over the allocation of an input that dies. The rewriter emits exactly these steps.

A training step runs as three programs: the forward program (up to the first execution of the last forward operator),
the caller's loss, and the backward program. A recomputation never runs inside of the caller's loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graph_capture.graph import Graph


@dataclass(frozen=True, slots=True)
class Compute:
    """Run `operator`. If `reuses` names a value, that value's allocation is taken over by an output, in place."""

    operator: int
    reuses: int | None = None


@dataclass(frozen=True, slots=True)
class Free:
    """Release `value`."""

    value: int


Step = Compute | Free


@dataclass(frozen=True)
class Schedule:
    """Executions and frees of one training step, in order; plain data, judged by :func:`solvers.simulator.simulate`.

    >>> Schedule.from_list([0, 1, -1, [2, 1]]).steps
    (Compute(operator=0, reuses=None), Compute(operator=1, reuses=None), Free(value=0), Compute(operator=2, reuses=1))
    """

    steps: tuple[Step, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The operators in the order of their executions."""
        return tuple(step.operator for step in self.steps if isinstance(step, Compute))

    @classmethod
    def store_all(cls, graph: Graph) -> Schedule:
        """Every operator once, in captured order."""
        return cls.from_order(graph, range(len(graph)))

    @classmethod
    def from_order(cls, graph: Graph, order: Iterable[int]) -> Schedule:
        """Add the earliest legal frees and the in-place reuses to a sequence of operator executions.

        **Arguments:**

        - `order`: operator indices. Each operator occurs at least once. A use binds to the latest execution of its
          producer before it. Nothing is checked here: the simulator judges the result.
        """
        executions = outside_loss(graph, order)
        programs = programs_of(graph, executions)
        dying = _dying_values(graph, executions)
        steps: list[Step] = []
        born: dict[int, int] = {}  # value -> position of the execution that made its present instance
        for position, index in enumerate(executions):
            operator = graph.operators[index]
            reuses = None
            for source, _ in operator.in_place:
                same_program = source in born and programs[born[source]] == programs[position]
                if source in dying[position] and same_program and graph.values[source].kind == "activation":
                    reuses = source
                    break
            steps.append(Compute(index, reuses))
            for value in operator.outputs:
                born[value] = position
            steps.extend(Free(value) for value in dying[position] if value != reuses)
        return cls(tuple(steps))

    def to_list(self) -> list[int | list[int]]:
        """Compact plain data: `o` computes operator o, `[o, v]` does so in the allocation of v, `-1 - v` frees v."""
        rows: list[int | list[int]] = []
        for step in self.steps:
            if isinstance(step, Free):
                rows.append(-1 - step.value)
            else:
                rows.append(step.operator if step.reuses is None else [step.operator, step.reuses])
        return rows

    @classmethod
    def from_list(cls, rows: Sequence[int | Sequence[int]]) -> Schedule:
        """Inverse of :meth:`to_list`."""
        steps: list[Step] = []
        for row in rows:
            if isinstance(row, int):
                steps.append(Compute(row) if row >= 0 else Free(-1 - row))
            else:
                steps.append(Compute(*row))
        return cls(tuple(steps))


def outside_loss(graph: Graph, order: Iterable[int]) -> list[int]:
    """Move recomputations that stand between loss operators behind the last of them: that code is the caller's."""
    executions = list(order)
    loss = [p for p, index in enumerate(executions) if graph.operators[index].phase == "loss"]
    if not loss:
        return executions
    last_forward = _last_forward_position(graph, executions)
    window = range(last_forward + 1, loss[-1] + 1)
    delayed = [executions[p] for p in window if graph.operators[executions[p]].phase != "loss"]
    kept = [executions[p] for p in window if graph.operators[executions[p]].phase == "loss"]
    return executions[: last_forward + 1] + kept + delayed + executions[loss[-1] + 1 :]


def programs_of(graph: Graph, executions: Sequence[int]) -> list[str]:
    """For each execution the program that it belongs to: `"forward"`, `"loss"` or `"backward"`."""
    last_forward = _last_forward_position(graph, executions)
    return [
        "forward" if p <= last_forward else "loss" if graph.operators[index].phase == "loss" else "backward"
        for p, index in enumerate(executions)
    ]


def _last_forward_position(graph: Graph, executions: Sequence[int]) -> int:
    """Where the last forward operator runs for the first time; -1 where there is none."""
    first = dict(zip(reversed(executions), range(len(executions) - 1, -1, -1), strict=True))
    forward = (i for i in range(graph.last_forward + 1) if graph.operators[i].phase == "forward")
    return max((first[i] for i in forward if i in first), default=-1)


def _dying_values(graph: Graph, executions: Sequence[int]) -> list[list[int]]:
    """For each execution the values whose present instance nobody needs after it."""
    dying: list[list[int]] = [[] for _ in executions]
    wanted = {v for v, value in enumerate(graph.values) if value.kind != "activation"}
    for position in range(len(executions) - 1, -1, -1):
        operator = graph.operators[executions[position]]
        for value in operator.outputs:
            if value not in wanted:
                dying[position].append(value)
        for value in operator.outputs:
            if graph.values[value].kind == "activation":
                wanted.discard(value)
        for value in operator.inputs:
            if value not in wanted:
                dying[position].append(value)
                wanted.add(value)
    return dying
