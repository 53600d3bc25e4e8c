"""Compiled beam search over topological orders, for the smallest peak without recomputation.

A state is the set of operators that have run. From each of the best states of one length every operator that may
follow is tried; of two states with the same set the one with the smaller peak stays (a hash of the set tells), and of
all of them the `width` best, by peak, then by bytes in memory. Width 1 is the greedy order. Gradients and outputs are
counted as staying, deliveries are left aside: an estimate, the simulator judges the order.
"""

# pyright: reportReturnType=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
from numba import njit

from solvers.free_order.kernel import (
    AFTER,
    BEFORE,
    INPUTS,
    OUTPUTS,
    PRODUCER,
    PROGRAM,
    SIZE,
    TAKES_OVER,
    USES,
    Problem,
)


@njit(cache=True)
def _effect(t: Problem, size: np.ndarray, left: np.ndarray, o: int) -> tuple[int, int]:
    """Bytes more while `o` runs, and after it; `left` holds the uses that each value still has."""
    made, staying, dying, taken = 0, 0, 0, 0
    for k in range(t.start[OUTPUTS, o], t.start[OUTPUTS, o + 1]):
        v = t.rows[k]
        made += size[v]
        if left[v] > 0 or t.values[SIZE, v] == 0:
            staying += size[v]
    for k in range(t.start[INPUTS, o], t.start[INPUTS, o + 1]):
        v = t.rows[k]
        if left[v] == 1:
            dying += t.values[SIZE, v]
            if (
                v == t.operators[TAKES_OVER, o]
                and t.operators[PROGRAM, t.values[PRODUCER, v]] == t.operators[PROGRAM, o]
            ):
                taken = t.values[SIZE, v]
    return made - taken + t.point[0, o], staying - dying


@njit(cache=True)
def _select(key: np.ndarray, code: np.ndarray, count: int, width: int) -> tuple[np.ndarray, int]:
    """The best candidates, at most `width`, each set once."""
    order = np.argsort(key[:count])
    chosen = np.empty(width, np.int64)
    n = 0
    for i in range(count):
        c = order[i]
        known = False
        for j in range(n):
            if code[chosen[j]] == code[c]:
                known = True
                break
        if not known:
            chosen[n] = c
            n += 1
            if n == width:
                break
    return chosen, n


@njit(cache=True)
def beam(t: Problem, size: np.ndarray, codes: np.ndarray, width: int) -> np.ndarray:
    """The order found; `size` has the bytes of all values, `codes` a random number for each operator."""
    n, n_values = t.cost.shape[0], size.shape[0]
    missing = np.zeros((width, n), np.int64)
    left = np.zeros((width, n_values), np.int64)
    live, peak = np.zeros(width, np.int64), np.zeros(width, np.int64)
    code = np.zeros(width, np.uint64)
    remaining = np.zeros(3, np.int64)
    for o in range(n):
        missing[0, o] = t.start[BEFORE, o + 1] - t.start[BEFORE, o]
        remaining[t.operators[PROGRAM, o]] += 1
    for v in range(n_values):
        left[0, v] = t.start[USES, v + 1] - t.start[USES, v]
    parent, ran = np.empty((n, width), np.int64), np.empty((n, width), np.int64)
    from_state, runs = np.empty(width * n, np.int64), np.empty(width * n, np.int64)
    new_peak, new_live = np.empty(width * n, np.int64), np.empty(width * n, np.int64)
    key, new_code = np.empty(width * n, np.float64), np.empty(width * n, np.uint64)
    states, program = 1, 0
    for step in range(n):
        while remaining[program] == 0:
            program += 1
        remaining[program] -= 1
        count = 0
        for b in range(states):
            for o in range(n):
                if missing[b, o] == 0 and t.operators[PROGRAM, o] == program:
                    during, after = _effect(t, size, left[b], o)
                    from_state[count], runs[count] = b, o
                    new_peak[count] = max(peak[b], live[b] + during)
                    new_live[count] = live[b] + after
                    new_code[count] = code[b] ^ codes[o]
                    key[count] = float(new_peak[count]) + float(new_live[count]) * 2.0**-40
                    count += 1
        chosen, found = _select(key, new_code, count, width)
        next_missing, next_left = np.empty_like(missing), np.empty_like(left)
        for j in range(found):
            c = chosen[j]
            b, o = from_state[c], runs[c]
            next_missing[j] = missing[b]
            next_left[j] = left[b]
            next_missing[j, o] = -1
            for k in range(t.start[AFTER, o], t.start[AFTER, o + 1]):
                next_missing[j, t.rows[k]] -= 1
            for k in range(t.start[INPUTS, o], t.start[INPUTS, o + 1]):
                next_left[j, t.rows[k]] -= 1
            parent[step, j], ran[step, j] = b, o
            live[j], peak[j], code[j] = new_live[c], new_peak[c], new_code[c]
        missing, left, states = next_missing, next_left, found
    result = np.empty(n, np.int64)
    b = 0
    for step in range(n - 1, -1, -1):
        result[step] = ran[step, b]
        b = parent[step, b]
    return result
