"""Compiled core of the walks in free order: a sequence in slots, and the bytes at every slot in a segment tree.

Imported lazily, because numba is. A sequence stands in a fixed number of *slots*, most of them empty at first, so that
an execution comes and goes without shifting the others. The three programs of a step have slots of their own: forward
ones, the caller's loss (no empty slot), backward ones. The tree adds to a range of slots and knows the maximum of all,
both in O(log slots), so a move costs what it changes: the lives of the operator's inputs and outputs.

What is counted: every instance of a value from its making to its last use (an instance that is taken over in place
until just before), workspace, generator states, outputs and gradients, deliveries and their copies, in one tree for
each regime. Where the simulator looks more closely (an in-place operator whose second choice dies, several deliveries
at once, a workspace beside a copy) more is counted, never less: the simulator judges what is found.

The tables are few and wide, and inner functions take arrays, because numba passes a tuple of arrays one by one.
"""

# numba compiles scalars out of array elements, which type checkers take for arrays
# pyright: reportReturnType=false, reportArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

INPUTS, OUTPUTS, USES, BEFORE, AFTER, FIXED = range(6)
"""Rows of `Problem.start`: of each operator the inputs, outputs, operators that must run before, and after it, and the
fixed lives that begin or end with it; of each value its uses."""

TAKES_OVER, REPEATABLE, RANDOM_STATE, PROGRAM = range(4)
"""Rows of `Problem.operators`: the input whose allocation it would take over first, or -1; whether it may run again;
bytes of the generator state; 0 forward, 1 loss, 2 backward."""

PRODUCER, SIZE = range(2)
"""Rows of `Problem.values`; the size is 0 where a value stays."""

BEGIN, DELAY, END, LIFE_BYTES, REGIME = range(5)
"""Rows of `Problem.fixed`, lives that no recomputation changes: the operator with whose run it begins, 1 if only
afterwards, the operator with whose run it ends (-1: it stays), bytes, regime."""

OPERATOR, FOLLOWING = range(2)
"""Rows of `State.slots`: what runs in a slot, -1: nothing; the slot of the next run of the same operator, or -1."""

HEAD, COUNT, PLACE, REPEATED = range(4)
"""Rows of `State.runs`: slot of the first run of each operator, or -1; number of runs; where it stands in the last
row, which lists the operators that run more than once."""


class Problem(NamedTuple):
    """A graph as arrays; the constants above name their rows."""

    start: np.ndarray  # list i of kind k is rows[start[k, i]:start[k, i + 1]]
    rows: np.ndarray
    operators: np.ndarray
    values: np.ndarray
    fixed: np.ndarray
    point: np.ndarray  # (regimes, operators): bytes while the operator runs: workspace, or copies at a delivery
    cost: np.ndarray  # percent of the store-all step
    program_start: np.ndarray  # four slot numbers: where each program begins, and the end


class State(NamedTuple):
    """A sequence of executions in slots; everything is changed in place."""

    slots: np.ndarray
    runs: np.ndarray
    repeated: np.ndarray  # [number of operators that run more than once]
    cost: np.ndarray  # [recomputed percent]
    top: np.ndarray  # (regimes, 2 · leaves): the tree's maxima
    lazy: np.ndarray  # (regimes, 2 · leaves): what is added to the whole of a node
    ends: np.ndarray  # scratch: where the lives that a move concerns end, before and after it


@njit(cache=True)
def _range_add(top: np.ndarray, lazy: np.ndarray, r: int, first: int, last: int, amount: int) -> None:
    """Add to the slots first..last in the tree of regime r."""
    if last < first or amount == 0:
        return
    leaves = top.shape[1] // 2
    left, right = first + leaves, last + leaves + 1
    a, b = left >> 1, (right - 1) >> 1
    while left < right:
        if left & 1:
            top[r, left] += amount
            lazy[r, left] += amount
            left += 1
        if right & 1:
            right -= 1
            top[r, right] += amount
            lazy[r, right] += amount
        left >>= 1
        right >>= 1
    while a >= 1:
        top[r, a] = max(top[r, 2 * a], top[r, 2 * a + 1]) + lazy[r, a]
        if b != a:
            top[r, b] = max(top[r, 2 * b], top[r, 2 * b + 1]) + lazy[r, b]
        a >>= 1
        b >>= 1


@njit(cache=True)
def peak_of(top: np.ndarray) -> int:
    """The most bytes at any slot, in the worse regime."""
    peak = top[0, 1]
    for r in range(1, top.shape[0]):
        peak = max(peak, top[r, 1])
    return peak


@njit(cache=True)
def latest(slots: np.ndarray, runs: np.ndarray, o: int, q: int) -> int:
    """The slot of the last run of `o` before slot q; -1 if there is none."""
    found = -1
    p = runs[HEAD, o]
    while p != -1 and p < q:
        found = p
        p = slots[FOLLOWING, p]
    return found


@njit(cache=True)
def _end(
    start: np.ndarray,
    rows: np.ndarray,
    operators: np.ndarray,
    program_start: np.ndarray,
    slots: np.ndarray,
    runs: np.ndarray,
    v: int,
    born: int,
    until: int,
) -> int:
    """The last slot at which the instance of v made at `born` is in memory; the next one is made at `until` (or -1)."""
    end = born
    if until == -1:
        until = slots.shape[1]
    for k in range(start[USES, v], start[USES, v + 1]):
        p = runs[HEAD, rows[k]]
        while p != -1 and p < until:
            end = max(end, p)
            p = slots[FOLLOWING, p]
    if end > born and operators[TAKES_OVER, slots[OPERATOR, end]] == v:
        same = (born < program_start[1]) == (end < program_start[1])
        if same and (born < program_start[2]) == (end < program_start[2]):
            end -= 1
    return end


@njit(cache=True)
def _lives(t: Problem, s: State, o: int, q: int, row: int) -> None:
    """Write into `s.ends[row]` where each life ends that a run of `o` in slot q concerns.

    Of each input one entry: its instance that slot q sees (-1: none). Of each output two: its instance before q, and
    the one made in q (q - 1, an empty life, if nothing runs there).
    """
    start, rows, values, slots, runs, ends = t.start, t.rows, t.values, s.slots, s.runs, s.ends
    n = 0
    for k in range(start[INPUTS, o], start[INPUTS, o + 1]):
        v = rows[k]
        ends[row, n] = -1
        if values[SIZE, v] > 0:
            born = latest(slots, runs, values[PRODUCER, v], q)
            if born != -1:
                until = slots[FOLLOWING, born]
                ends[row, n] = _end(start, rows, t.operators, t.program_start, slots, runs, v, born, until)
        n += 1
    present = slots[OPERATOR, q] == o
    earlier = latest(slots, runs, o, q)
    later = runs[HEAD, o] if earlier == -1 else slots[FOLLOWING, earlier]
    if present:
        later = slots[FOLLOWING, q]
    for k in range(start[OUTPUTS, o], start[OUTPUTS, o + 1]):
        v = rows[k]
        ends[row, n] = -1
        ends[row, n + 1] = q - 1
        if values[SIZE, v] > 0:
            for which in range(2):
                born = earlier if which == 0 else q
                until = q if present and which == 0 else later
                if (which == 0 and earlier != -1) or (which == 1 and present):
                    end = _end(start, rows, t.operators, t.program_start, slots, runs, v, born, until)
                    ends[row, n + which] = end
        n += 2


@njit(cache=True)
def _apply(t: Problem, s: State, o: int) -> None:
    """Bring the tree from the lives in `s.ends[0]` to those in `s.ends[1]`."""
    ends, top, lazy = s.ends, s.top, s.lazy
    n_inputs = t.start[INPUTS, o + 1] - t.start[INPUTS, o]
    n = n_inputs + 2 * (t.start[OUTPUTS, o + 1] - t.start[OUTPUTS, o])
    for i in range(n):
        old, new = ends[0, i], ends[1, i]
        if old == new or (old == -1 and (i < n_inputs or (i - n_inputs) % 2 == 0)):
            continue
        k = t.start[INPUTS, o] + i if i < n_inputs else t.start[OUTPUTS, o] + (i - n_inputs) // 2
        size = t.values[SIZE, t.rows[k]]
        for r in range(top.shape[0]):
            _range_add(top, lazy, r, min(old, new) + 1, max(old, new), size if new > old else -size)


@njit(cache=True)
def _special_lives(t: Problem, s: State, o: int, sign: int) -> None:
    """Generator states; outputs, gradients and copies whose lives begin or end with operator o."""
    size, head = sign * t.operators[RANDOM_STATE, o], s.runs[HEAD, o]
    if size != 0 and s.runs[COUNT, o] > 1:
        last = head
        while s.slots[FOLLOWING, last] != -1:
            last = s.slots[FOLLOWING, last]
            for r in range(s.top.shape[0]):  # at each replay the present state is put aside
                _range_add(s.top, s.lazy, r, last, last, size)
        for r in range(s.top.shape[0]):
            _range_add(s.top, s.lazy, r, head, last, size)
    for k in range(t.start[FIXED, o], t.start[FIXED, o + 1]):
        f = t.rows[k]
        begin = s.runs[HEAD, t.fixed[BEGIN, f]]
        end = s.slots.shape[1] - 1
        if t.fixed[END, f] >= 0:
            end = s.runs[HEAD, t.fixed[END, f]]
        if begin != -1 and end != -1:
            amount = sign * t.fixed[LIFE_BYTES, f]
            _range_add(s.top, s.lazy, t.fixed[REGIME, f], begin + t.fixed[DELAY, f], end, amount)


@njit(cache=True)
def _count(s: State, o: int, sign: int, price: float) -> None:
    """Book one run of `o` more or less: its price, and the list of what is repeated."""
    runs = s.runs
    before = runs[COUNT, o]
    runs[COUNT, o] += sign
    if before + sign >= 1 and before >= 1:
        s.cost[0] += sign * price
    if sign > 0 and before == 1:
        runs[PLACE, o] = s.repeated[0]
        runs[REPEATED, s.repeated[0]] = o
        s.repeated[0] += 1
    elif sign < 0 and before == 2:
        s.repeated[0] -= 1
        moved = runs[REPEATED, s.repeated[0]]
        runs[REPEATED, runs[PLACE, o]] = moved
        runs[PLACE, moved] = runs[PLACE, o]


@njit(cache=True)
def switch(t: Problem, s: State, o: int, q: int) -> None:
    """Run `o` in slot q if it is empty; empty it if `o` runs there. Twice changes nothing."""
    slots, runs = s.slots, s.runs
    sign = 1 if slots[OPERATOR, q] == -1 else -1
    special = t.operators[RANDOM_STATE, o] > 0 or t.start[FIXED, o] < t.start[FIXED, o + 1]
    if special:
        _special_lives(t, s, o, -1)
    _lives(t, s, o, q, 0)
    earlier = latest(slots, runs, o, q)
    after = q
    if sign > 0:
        slots[OPERATOR, q] = o
        slots[FOLLOWING, q] = runs[HEAD, o] if earlier == -1 else slots[FOLLOWING, earlier]
    else:
        slots[OPERATOR, q] = -1
        after = slots[FOLLOWING, q]
    if earlier == -1:
        runs[HEAD, o] = after
    else:
        slots[FOLLOWING, earlier] = after
    _count(s, o, sign, t.cost[o])
    _lives(t, s, o, q, 1)
    _apply(t, s, o)
    for r in range(s.top.shape[0]):
        _range_add(s.top, s.lazy, r, q, q, sign * t.point[r, o])
    if special:
        _special_lives(t, s, o, 1)


@njit(cache=True)
def fill(t: Problem, s: State, executions: np.ndarray, places: np.ndarray) -> None:
    """Run the executions in the given empty slots."""
    for i in range(executions.shape[0]):
        switch(t, s, executions[i], places[i])
