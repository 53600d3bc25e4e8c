"""Compiled moves and the Metropolis walk over sequences in free order: add, remove, rotate.

*Add* puts recomputations before a user, a chain of inputs of inputs at most twelve long; *remove* takes one run of a
repeated operator out; *rotate* moves one run to another slot, which rotates what stands between. A move is carried
out, looked at, and undone if it is refused.
"""

# pyright: reportReturnType=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
from numba import njit

from solvers.free_order.kernel import (
    AFTER,
    BEFORE,
    COUNT,
    FOLLOWING,
    HEAD,
    INPUTS,
    OPERATOR,
    PRODUCER,
    PROGRAM,
    REPEATABLE,
    REPEATED,
    Problem,
    State,
    latest,
    peak_of,
    switch,
)
from solvers.snapshot.kernel import random_below, random_unit

MAX_STEPS = 32
"""Insertions and removals of one move, for the undoing."""


@njit(cache=True)
def window(t: Problem, s: State, o: int) -> tuple[int, int]:
    """The slots between which the first run of `o` may stand, both included."""
    low, high = t.program_start[t.operators[PROGRAM, o]], t.program_start[t.operators[PROGRAM, o] + 1] - 1
    for k in range(t.start[BEFORE, o], t.start[BEFORE, o + 1]):
        low = max(low, s.runs[HEAD, t.rows[k]] + 1)
    for k in range(t.start[AFTER, o], t.start[AFTER, o + 1]):
        high = min(high, s.runs[HEAD, t.rows[k]] - 1)
    return low, high


@njit(cache=True)
def _empty_before(s: State, q: int, low: int) -> int:
    """The last empty slot before q and not before `low`; -1 if there is none."""
    p = q - 1
    while p >= low:
        if s.slots[OPERATOR, p] == -1:
            return p
        p -= 1
    return -1


@njit(cache=True)
def _empty_near(rng: np.ndarray, s: State, q: int, low: int, high: int) -> int:
    """An empty slot in low..high at or beside q; -1 if a few steps find none."""
    step = 1 if random_unit(rng) < 0.5 else -1
    for _ in range(24):
        if q < low or q > high:
            return -1
        if s.slots[OPERATOR, q] == -1:
            return q
        q += step
    return -1


@njit(cache=True)
def _random_run(rng: np.ndarray, s: State) -> int:
    """A slot in which something runs."""
    while True:
        p = random_below(rng, s.slots.shape[1])
        if s.slots[OPERATOR, p] != -1:
            return p


@njit(cache=True)
def _switch(t: Problem, s: State, o: int, q: int, log: np.ndarray, n: int) -> int:
    switch(t, s, o, q)
    log[n, 0], log[n, 1] = o, q
    return n + 1


@njit(cache=True)
def undo(t: Problem, s: State, log: np.ndarray, n: int) -> None:
    """Take the last n insertions and removals back."""
    for i in range(n - 1, -1, -1):
        switch(t, s, log[i, 0], log[i, 1])


@njit(cache=True)
def _recompute_chain(t: Problem, rng: np.ndarray, s: State, log: np.ndarray, n: int) -> int:
    """Add: recompute an input of a random run before it, with a chain of its own inputs."""
    at = _random_run(rng, s)
    for depth in range(12):
        o = s.slots[OPERATOR, at]
        n_inputs = t.start[INPUTS, o + 1] - t.start[INPUTS, o]
        if n_inputs == 0:
            break
        u = t.values[PRODUCER, t.rows[t.start[INPUTS, o] + random_below(rng, n_inputs)]]
        if not t.operators[REPEATABLE, u]:
            break
        born = latest(s.slots, s.runs, u, at)
        if born == -1:
            break
        q = -1
        if random_unit(rng) < 0.7:
            q = _empty_before(s, at, born + 1)
        elif at - born > 1:
            q = _empty_near(rng, s, born + 1 + random_below(rng, at - born - 1), born + 1, at - 1)
        if q == -1:
            break
        n = _switch(t, s, u, q, log, n)
        at = q
        if depth == 11 or random_unit(rng) < 0.5:
            break
    return n


@njit(cache=True)
def _remove(t: Problem, rng: np.ndarray, s: State, log: np.ndarray, n: int) -> int:
    """Remove: take a random run of a repeated operator out; the first one only where the second may be first."""
    if s.repeated[0] == 0:
        return n
    o = s.runs[REPEATED, random_below(rng, s.repeated[0])]
    which = random_below(rng, s.runs[COUNT, o])
    p = s.runs[HEAD, o]
    if which == 0:
        _, high = window(t, s, o)
        if s.slots[FOLLOWING, p] > high:
            which = 1
    for _ in range(which):
        p = s.slots[FOLLOWING, p]
    return _switch(t, s, o, p, log, n)


@njit(cache=True)
def _rotate(t: Problem, rng: np.ndarray, s: State, repeated_only: bool, log: np.ndarray, n: int) -> int:
    """Rotate: move a random run, mostly a short way; with `repeated_only` one that is not the first of its operator."""
    if repeated_only:
        if s.repeated[0] == 0:
            return n
        o = s.runs[REPEATED, random_below(rng, s.repeated[0])]
        p = s.slots[FOLLOWING, s.runs[HEAD, o]]
        for _ in range(random_below(rng, s.runs[COUNT, o] - 1)):
            p = s.slots[FOLLOWING, p]
    else:
        p = _random_run(rng, s)
        o = s.slots[OPERATOR, p]
    if t.operators[PROGRAM, o] == 1:
        return n
    low, limit = window(t, s, o)
    high = s.slots.shape[1] - 1
    if s.runs[HEAD, o] == p and (s.slots[FOLLOWING, p] == -1 or s.slots[FOLLOWING, p] > limit):
        high = limit
    if high <= low:
        return n
    if random_unit(rng) < 0.3:
        q = low + random_below(rng, high - low + 1)
    else:
        way = 1 + int(random_unit(rng) ** 3 * (high - low))
        q = p - way if random_unit(rng) < 0.5 else p + way
        q = max(low, min(high, q))
    q = _empty_near(rng, s, q, low, high)
    if q == -1:
        return n
    n = _switch(t, s, o, p, log, n)
    return _switch(t, s, o, q, log, n)


@njit(cache=True)
def _forward_ends_with_a_replay(t: Problem, s: State) -> bool:
    """Whether a replay is the last in the forward slots: it would run behind the loss, and is not counted so."""
    p = t.program_start[1] - 1
    if p == s.slots.shape[1] - 1:
        return False
    while p >= 0 and s.slots[OPERATOR, p] == -1:
        p -= 1
    return p >= 0 and s.runs[HEAD, s.slots[OPERATOR, p]] != p


@njit(cache=True)
def _propose(t: Problem, rng: np.ndarray, s: State, recompute: bool, captured: bool, log: np.ndarray) -> int:
    """Carry one random move out; returns the number of its steps, 0 if it is impossible."""
    if not recompute:
        return _rotate(t, rng, s, False, log, 0)
    u = random_unit(rng)
    if u < 0.3:
        n = _recompute_chain(t, rng, s, log, 0)
        if n > 0 and random_unit(rng) < 0.3:
            n = _remove(t, rng, s, log, n)
        return n
    if u < 0.5:
        n = _remove(t, rng, s, log, 0)
        while 0 < n < 6 and random_unit(rng) < 0.4:
            before = n
            n = _remove(t, rng, s, log, n)
            if n == before:
                break
        return n
    return _rotate(t, rng, s, captured, log, 0)


@njit(cache=True)
def walk(
    t: Problem,
    s: State,
    rng: np.ndarray,
    best: np.ndarray,
    best_energy: float,
    budget: int,
    price: float,
    temperature: float,
    moves: int,
    recompute: bool,
    captured: bool,
) -> float:
    """`moves` Metropolis moves at one temperature.

    The energy is the recomputed percent + price · (peak − budget) / budget where the peak is above. `best` gets the
    slots of the cheapest sequence within the budget; without `recompute` of the smallest peak. Returns the percent of
    `best`, or its peak in bytes. `captured`: first executions keep captured order, so only repeated ones are rotated.
    """
    log = np.empty((MAX_STEPS, 2), np.int64)
    per_byte = price / max(1, budget)
    energy = s.cost[0] + per_byte * max(0, peak_of(s.top) - budget)
    for _ in range(moves):
        n = _propose(t, rng, s, recompute, captured, log)
        if n == 0:
            continue
        if _forward_ends_with_a_replay(t, s):
            undo(t, s, log, n)
            continue
        peak = peak_of(s.top)
        after = s.cost[0] + per_byte * max(0, peak - budget)
        if after <= energy - temperature * np.log(max(1e-300, random_unit(rng))):
            energy = after
            if recompute:
                if peak <= budget and s.cost[0] < best_energy - 1e-9:
                    best[:] = s.slots[OPERATOR]
                    best_energy = s.cost[0]
            elif peak < best_energy:
                best[:] = s.slots[OPERATOR]
                best_energy = float(peak)
                if peak <= budget:
                    break
        else:
            undo(t, s, log, n)
    return best_energy


@njit(cache=True)
def drop_needless(t: Problem, s: State, budget: int) -> None:
    """Take out, dearest first, each run of a repeated operator without which the sequence still fits."""
    dearest = np.argsort(-t.cost)
    for o in dearest:
        p = s.runs[HEAD, o]
        while p != -1 and s.runs[COUNT, o] > 1:
            behind = s.slots[FOLLOWING, p]
            _, high = window(t, s, o)
            if p != s.runs[HEAD, o] or behind <= high:
                switch(t, s, o, p)
                if peak_of(s.top) > budget or _forward_ends_with_a_replay(t, s):
                    switch(t, s, o, p)
            p = behind
