"""A graph and a sequence of executions as the arrays of :mod:`solvers.free_order.kernel`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graph_capture.graph import PHASES, Graph, Value
from solvers.precedence import kept_orders
from solvers.schedule import outside_loss, programs_of
from solvers.structure import repeatable

if TYPE_CHECKING:
    from solvers.free_order.kernel import Problem, State

SPARE_SLOTS = 16
"""Empty slots of a program beyond one for each execution."""


def problem_of(graph: Graph, lengths: Sequence[int], captured_order: bool = False) -> Problem:
    """The tables of `graph`; the slots of each program hold twice as many executions as `lengths` says.

    With `captured_order` first executions keep captured order: the walks then stay in the ordered class.
    """
    import numpy as np

    from solvers.free_order.kernel import Problem

    operators, values = graph.operators, graph.values
    starts = [0]
    spare = (lengths[0] + SPARE_SLOTS, 0, lengths[2] + lengths[0] + SPARE_SLOTS if lengths[2] else 0)
    for length, more in zip(lengths, spare, strict=True):
        starts.append(starts[-1] + length + more)
    before: list[list[int]] = [[] for _ in operators]
    after: list[list[int]] = [[] for _ in operators]
    pairs = itertools.pairwise(range(len(operators))) if captured_order else sorted(set(kept_orders(graph)))
    for earlier, later in pairs:
        before[later].append(earlier)
        after[earlier].append(later)
    lives = _fixed_lives(graph)
    fixed: list[list[int]] = [[] for _ in operators]
    for number, (begin, _, end, _, _) in enumerate(lives):
        for operator in {begin, end} - {-1}:
            fixed[operator].append(number)
    lists = (
        [o.inputs for o in operators],
        [o.outputs for o in operators],
        graph.uses,
        before,
        after,
        fixed,
    )
    start, rows = _rows(lists, max(len(operators), len(values)))
    step_seconds = graph.step_seconds or 1.0
    again = [repeatable(graph, i) and bool(o.outputs) for i, o in enumerate(operators)]
    columns = [
        [o.in_place[0][0] if o.in_place else -1 for o in operators],
        [int(r) for r in again],
        [o.random_state_bytes for o in operators],
        [PHASES.index(o.phase) for o in operators],
    ]
    return Problem(
        start=start,
        rows=rows,
        operators=_integers(columns),
        values=_integers([[v.producer for v in values], [_moving_bytes(v) for v in values]]),
        fixed=_integers([[life[row] for life in lives] for row in range(5)]),
        point=_points(graph),
        cost=np.array([100.0 * o.seconds / step_seconds for o in operators], dtype=np.float64),
        program_start=_integers(starts),
    )


def _moving_bytes(value: Value) -> int:
    """Bytes of a value that comes and goes; 0 of one that stays."""
    return value.size_bytes if value.kind == "activation" else 0


def lengths_of(graph: Graph, order: Sequence[int]) -> list[int]:
    """How many executions of a sequence each program has."""
    programs = programs_of(graph, outside_loss(graph, order))
    return [programs.count(phase) for phase in PHASES]


def state_of(graph: Graph, problem: Problem, order: Sequence[int]) -> State:
    """A sequence of executions, spread over the slots of its programs; its first runs must be in a legal order."""
    import numpy as np

    from solvers.free_order.kernel import State, fill

    executions = outside_loss(graph, order)
    starts = problem.program_start.tolist()
    slots, n, regimes = starts[-1], len(graph), len(problem.point)
    leaves = 2
    while leaves < slots:
        leaves *= 2
    most = max((len(o.inputs) + 2 * len(o.outputs) for o in graph.operators), default=0)
    state = State(
        slots=np.full((2, slots), -1, np.int64),
        runs=np.zeros((4, n), np.int64),
        repeated=np.zeros(1, np.int64),
        cost=np.zeros(1, np.float64),
        top=np.zeros((regimes, 2 * leaves), np.int64),
        lazy=np.zeros((regimes, 2 * leaves), np.int64),
        ends=np.zeros((2, most + 1), np.int64),
    )
    state.runs[0] = -1
    for regime, base in enumerate((0, graph.accumulated_gradient_bytes)[:regimes]):
        state.top[regime, 1] = state.lazy[regime, 1] = graph.resident_total_bytes + base
    programs = programs_of(graph, executions)
    members_of = {phase: programs.count(phase) for phase in PHASES}
    number, places = [0, 0, 0], list[int]()
    for name in programs:
        program = PHASES.index(name)
        room = starts[program + 1] - starts[program]
        places.append(starts[program] + number[program] * room // members_of[name])
        number[program] += 1
    fill(problem, state, _integers(executions), _integers(places))
    return state


def order_of(slots: Any) -> list[int]:
    """The sequence of executions that slots hold."""
    return slots[slots >= 0].tolist()


def _fixed_lives(graph: Graph) -> list[tuple[int, int, int, int, int]]:
    """What no recomputation changes, as rows (begins with, 1 if only afterwards, ends with or -1, bytes, regime)."""
    lives: list[tuple[int, int, int, int, int]] = []
    regimes = 2 if graph.gradient_accumulation else 1
    for v, value in enumerate(graph.values):
        if value.kind == "activation":
            continue
        delivered = value.delivered_after
        copy = value.delivery_copy_bytes
        for regime in range(regimes):
            end = -1
            # a gradient that is read after its delivery, or may be, is not released
            if delivered is not None and (copy or regime == 1):
                again = any(u > delivered or repeatable(graph, u) for u in graph.uses[v])
                end = -1 if again else delivered
            lives.append((value.producer, 0, end, value.size_bytes, regime))
        if delivered is not None and copy:
            lives.append((delivered, 1, -1, copy, 0))
    return lives


def _points(graph: Graph) -> Any:
    """Bytes that exist only while an operator runs: its workspace, or the copies that its deliveries make."""
    copies = [0] * len(graph)
    for value in graph.values:
        if value.delivered_after is not None:
            copies[value.delivered_after] += value.delivery_copy_bytes
    workspace = [o.workspace_bytes for o in graph.operators]
    rows = [[max(pair) for pair in zip(workspace, copies, strict=True)]]
    if graph.gradient_accumulation:
        rows.append(workspace)
    return _integers(rows)


def _integers(numbers: Sequence[int] | Sequence[Sequence[int]]) -> Any:
    import numpy as np

    return np.array(numbers, dtype=np.int64)


def _rows(lists: Sequence[Sequence[Sequence[int]]], width: int) -> tuple[Any, Any]:
    """All lists behind one another, and where each begins; one row of starts for each kind of list."""
    import numpy as np

    start = np.zeros((len(lists), width + 1), np.int64)
    flat: list[int] = []
    for kind, rows in enumerate(lists):
        lengths = np.zeros(width + 1, np.int64)
        lengths[1 : len(rows) + 1] = [len(row) for row in rows]
        start[kind] = len(flat) + np.cumsum(lengths)
        flat.extend(v for row in rows for v in row)
    return start, np.array(flat, dtype=np.int64)
