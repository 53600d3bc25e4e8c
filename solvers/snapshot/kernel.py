"""Compiled inner loops of the annealer: the memory of a sequence of executions, and the Metropolis walk over them.

Imported lazily by :mod:`solvers.snapshot.anneal`, because numba is. A sequence is an array of operator indices in
which the first executions stand in captured order, with recomputations between them.

The memory is found in one pass *backwards*: behind a position it is known which values are still wanted, so the bytes
at each execution follow with no intervals to build. It is exactly what ``Schedule.from_order`` and the simulator give
(a test holds them together), but for an operator whose first in-place input turns out to belong to another program.
"""

# numba compiles scalars out of array elements, which type checkers take for arrays
# pyright: reportReturnType=false, reportArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

FORWARD, LOSS, BACKWARD = 0, 1, 2


class Tables(NamedTuple):
    """A graph as arrays; `*_start` index the flat lists as in a sparse matrix by rows."""

    input_start: np.ndarray
    inputs: np.ndarray
    output_start: np.ndarray
    outputs: np.ndarray
    in_place_start: np.ndarray
    in_place: np.ndarray
    producer: np.ndarray
    size: np.ndarray  # bytes of each value that comes and goes, 0 of one that stays
    stays: np.ndarray  # outputs and gradients
    released: np.ndarray  # values that must not be held across the turn
    running: np.ndarray  # constant bytes while operator j first runs
    afterwards: np.ndarray  # constant bytes after operator j's first run
    workspace: np.ndarray
    random_state: np.ndarray
    repeatable: np.ndarray
    is_loss: np.ndarray
    cost: np.ndarray  # percent of the store-all step
    last_forward: int
    last_loss: int


@njit(cache=True)
def random_unit(state: np.ndarray) -> float:
    """Uniform in [0, 1); xorshift64*, so that a seed means the same on every machine and numba version."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return float((x * np.uint64(2685821657736338717)) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(cache=True)
def random_below(state: np.ndarray, limit: int) -> int:
    """Uniform integer in 0..limit-1."""
    return min(limit - 1, int(random_unit(state) * limit))


@njit(cache=True)
def _program(t: Tables, firsts: int, index: int) -> int:
    """The program of an execution before which `firsts` operators have run."""
    if firsts <= t.last_forward:
        return FORWARD
    return LOSS if t.is_loss[index] else BACKWARD


@njit(cache=True)
def price(t: Tables, seq: np.ndarray, length: int, firsts: np.ndarray) -> float:
    """Recomputed percent of a sequence; fills firsts[p] = number of first executions before position p."""
    count = 0
    cost = 0.0
    for p in range(length):
        firsts[p] = count
        if seq[p] == count:
            count += 1
        else:
            cost += t.cost[seq[p]]
    return cost


@njit(cache=True)
def memory(
    t: Tables,
    seq: np.ndarray,
    length: int,
    budget: int,
    firsts: np.ndarray,
    wanted: np.ndarray,
    taken_at: np.ndarray,
    replayed: np.ndarray,
    profile: np.ndarray,
    peak_price: float,
    excess_price: float,
    most: float,
) -> tuple[int, float]:
    """Fill `profile` with the bytes at each execution; returns (peak bytes, excess bytes summed over executions).

    `firsts` comes from :func:`price`; `wanted`, `taken_at` and `replayed` are scratch, `replayed` comes all False.
    Stops early, and returns what it has, once peak_price · excess of the peak + excess_price · sum is above `most`.
    """
    wanted[:] = t.stays
    taken_at[:] = -1
    live, states = 0, 0
    peak, excess = 0, 0.0
    program = BACKWARD
    n_taken = 0
    for p in range(length - 1, -1, -1):
        o = seq[p]
        first = firsts[p] == o
        now = _program(t, firsts[p], o)
        if now != program:
            if n_taken > 0:  # an instance from an earlier program cannot be taken over after all
                for v in range(taken_at.shape[0]):
                    if taken_at[v] >= 0:
                        if wanted[v]:
                            profile[taken_at[v]] += t.size[v]
                            excess_before = profile[taken_at[v]] - t.size[v] - budget
                            excess += max(0, profile[taken_at[v]] - budget) - max(0, excess_before)
                            peak = max(peak, profile[taken_at[v]])
                        taken_at[v] = -1
                n_taken = 0
            if now == FORWARD and t.released.shape[0] > 0:
                held = 0
                for v in t.released:
                    if wanted[v]:
                        held += t.size[v] + (budget >> 2)  # so that small values weigh something, too
                if held > 0:  # over the budget, whatever else fits
                    peak = max(peak, budget + held)
                    excess += held
            program = now
        gone = 0  # bytes that exist while o runs, and not after it
        for q in range(t.output_start[o], t.output_start[o + 1]):
            v = t.outputs[q]
            if t.stays[v]:
                continue
            if wanted[v]:
                wanted[v] = False
                if taken_at[v] >= 0:
                    taken_at[v] = -1
                    n_taken -= 1
            else:
                gone += t.size[v]
        made = 0
        for q in range(t.output_start[o], t.output_start[o + 1]):
            made += t.size[t.outputs[q]]
        dying = 0
        taken = 0
        for q in range(t.input_start[o], t.input_start[o + 1]):
            v = t.inputs[q]
            if not wanted[v]:
                dying += t.size[v]
        if t.in_place_start[o] < t.in_place_start[o + 1]:
            for q in range(t.in_place_start[o], t.in_place_start[o + 1]):
                v = t.in_place[q]
                if not wanted[v] and not t.stays[v]:
                    taken = t.size[v]
                    taken_at[v] = p
                    n_taken += 1
                    break
        for q in range(t.input_start[o], t.input_start[o + 1]):
            wanted[t.inputs[q]] = True
        if not first and t.random_state[o] > 0 and not replayed[o]:
            replayed[o] = True  # its last replay: the generator state of its first run is kept until here
            states += t.random_state[o]
        instant = live + gone + dying - taken + states
        if first:
            instant += t.running[o]
            if replayed[o]:
                replayed[o] = False
                states -= t.random_state[o]
        else:
            instant += t.afterwards[firsts[p] - 1] + t.workspace[o] + t.random_state[o]
        profile[p] = instant
        if instant > peak:
            peak = instant
        if instant > budget:
            excess += instant - budget
            if peak_price * (peak - budget) + excess_price * excess > most:
                replayed[:] = False
                return peak, excess
        live += gone - made + dying
    return peak, excess


@njit(cache=True)
def drop_needless(t: Tables, seq: np.ndarray, length: int, budget: int) -> int:
    """Erase, dearest first, each recomputation without which the sequence still fits; returns the new length."""
    firsts = np.empty(length + 1, np.int64)
    wanted = np.empty(t.stays.shape[0], np.bool_)
    taken_at = np.empty(t.stays.shape[0], np.int64)
    replayed = np.zeros(t.cost.shape[0], np.bool_)
    profile = np.empty(length, np.int64)
    candidate = np.empty_like(seq)
    positions = np.empty(length, np.int64)
    n = _reruns(seq, length, positions)
    prices = np.empty(n, np.float64)
    for q in range(n):
        prices[q] = -t.cost[seq[positions[q]]]
    by_price = np.argsort(prices)
    gone = np.zeros(n, np.bool_)
    for q in by_price:
        shift = 0
        for other in range(q):
            shift += gone[other]
        candidate[:length] = seq[:length]
        shorter = _erase(candidate, length, positions[q] - shift, 1)
        price(t, candidate, shorter, firsts)
        peak, _ = memory(
            t, candidate, shorter, budget, firsts, wanted, taken_at, replayed, profile, 0.0, 1.0, 0.0
        )  # fmt: skip
        if peak <= budget:
            seq[:shorter] = candidate[:shorter]
            length = shorter
            gone[q] = True
    return length


@njit(cache=True)
def _insert(seq: np.ndarray, length: int, at: int, block: np.ndarray, n_block: int) -> int:
    for p in range(length - 1, at - 1, -1):
        seq[p + n_block] = seq[p]
    for p in range(n_block):
        seq[at + p] = block[p]
    return length + n_block


@njit(cache=True)
def _erase(seq: np.ndarray, length: int, at: int, count: int) -> int:
    for p in range(at, length - count):
        seq[p] = seq[p + count]
    return length - count


@njit(cache=True)
def _insertable(t: Tables, seq: np.ndarray, length: int, at: int, block: np.ndarray, n_block: int) -> bool:
    """Whether the block may stand before position `at`: each operator has run, and the loss is not interrupted."""
    count = 0
    for p in range(at):
        if seq[p] == count:
            count += 1
    if t.last_forward < count <= t.last_loss:
        return False
    for b in range(n_block):  # noqa: SIM110 (numba compiles no generator expressions)
        if block[b] >= count:
            return False
    return True


@njit(cache=True)
def _add_chain(t: Tables, rng: np.ndarray, seq: np.ndarray, length: int, block: np.ndarray) -> int:
    """Recompute an input of a random execution right before it, with a chain of its own inputs; -1 if impossible."""
    at = random_below(rng, length)
    o = seq[at]
    n_inputs = t.input_start[o + 1] - t.input_start[o]
    if n_inputs == 0:
        return -1
    current = t.producer[t.inputs[t.input_start[o] + random_below(rng, n_inputs)]]
    if not t.repeatable[current]:
        return -1
    depth = 1
    while depth < 12 and random_unit(rng) < 0.5:
        depth += 1
    n_block = 0
    for _ in range(depth):
        block[n_block] = current
        n_block += 1
        n_inputs = t.input_start[current + 1] - t.input_start[current]
        if n_inputs == 0:
            break
        current = t.producer[t.inputs[t.input_start[current] + random_below(rng, n_inputs)]]
        if not t.repeatable[current]:
            break
    for b in range(n_block // 2):
        block[b], block[n_block - 1 - b] = block[n_block - 1 - b], block[b]
    if length + n_block >= seq.shape[0] or not _insertable(t, seq, length, at, block, n_block):
        return -1
    return _insert(seq, length, at, block, n_block)


@njit(cache=True)
def _reruns(seq: np.ndarray, length: int, positions: np.ndarray) -> int:
    """Positions of the recomputations; returns how many there are."""
    count, n = 0, 0
    for p in range(length):
        if seq[p] == count:
            count += 1
        else:
            positions[n] = p
            n += 1
    return n


@njit(cache=True)
def _move(t: Tables, rng: np.ndarray, seq: np.ndarray, length: int, at: int, block: np.ndarray, n_block: int) -> int:
    """Move the recomputations that stand at `at`; mostly a short way. -1 if they cannot stand there."""
    for b in range(n_block):
        block[b] = seq[at + b]
    rest = _erase(seq, length, at, n_block)
    span = 1 + int(random_unit(rng) ** 3 * length / 2)
    way = 1 + random_below(rng, span)
    target = at - way if random_unit(rng) < 0.5 else at + way
    target = max(0, min(rest, target))
    if not _insertable(t, seq, rest, target, block, n_block):
        return -1
    return _insert(seq, rest, target, block, n_block)


@njit(cache=True)
def _propose(t: Tables, rng: np.ndarray, seq: np.ndarray, length: int, block: np.ndarray, positions: np.ndarray) -> int:
    """Change `seq` in place by one random move; returns the new length, or -1 if the move is impossible."""
    u = random_unit(rng)
    if u < 0.40:
        length = _add_chain(t, rng, seq, length, block)
        if length > 0 and random_unit(rng) < 0.3:
            n = _reruns(seq, length, positions)
            if n > 0:
                length = _erase(seq, length, positions[random_below(rng, n)], 1)
        return length
    n = _reruns(seq, length, positions)
    if n == 0:
        return -1
    chosen = random_below(rng, n)
    if u < 0.65:
        count = 1
        while count < 6 and random_unit(rng) < 0.4:
            count += 1
        for q in range(min(n - 1, chosen + count - 1), chosen - 1, -1):
            length = _erase(seq, length, positions[q], 1)
        return length
    n_block = 1
    if u >= 0.9:
        while (
            n_block < 10
            and chosen + n_block < n
            and positions[chosen + n_block] == positions[chosen] + n_block
            and random_unit(rng) < 0.7
        ):
            n_block += 1
    return _move(t, rng, seq, length, positions[chosen], block, n_block)


@njit(cache=True)
def walk(
    t: Tables,
    rng: np.ndarray,
    seq: np.ndarray,
    length: int,
    best: np.ndarray,
    best_length: int,
    best_cost: float,
    budget: int,
    moves: int,
    temperature: float,
    peak_price: float,
    excess_price: float,
) -> tuple[int, int, float]:
    """`moves` Metropolis moves at one temperature; `seq` and `best` are changed in place.

    The energy is the recomputed percent + peak_price · relative excess of the peak + excess_price · relative excess
    summed over the executions. `best` is the cheapest sequence within the budget. Returns (length of seq, length of
    best, percent of best).
    """
    capacity = seq.shape[0]
    firsts = np.empty(capacity + 1, np.int64)
    wanted = np.empty(t.stays.shape[0], np.bool_)
    taken_at = np.empty(t.stays.shape[0], np.int64)
    profile = np.empty(capacity, np.int64)
    replayed = np.zeros(t.cost.shape[0], np.bool_)
    positions = np.empty(capacity, np.int64)
    block = np.empty(16, np.int64)
    candidate = np.empty_like(seq)
    cost = price(t, seq, length, firsts)
    peak, excess = memory(t, seq, length, budget, firsts, wanted, taken_at, replayed, profile, 0.0, 0.0, 0.0)
    scale = 1.0 / max(1, budget)
    peak_price *= scale  # from here on per byte
    excess_price *= scale
    energy = cost + peak_price * max(0, peak - budget) + excess_price * excess
    if peak <= budget and cost < best_cost:
        best[:length] = seq[:length]
        best_length, best_cost = length, cost
    for _ in range(moves):
        candidate[:length] = seq[:length]
        proposed = _propose(t, rng, candidate, length, block, positions)
        if proposed < 0:
            continue
        # the Metropolis rule with its random number drawn first: most candidates are refused before all is counted
        acceptable = energy - temperature * np.log(max(1e-300, random_unit(rng)))
        cost = price(t, candidate, proposed, firsts)
        if cost > acceptable:
            continue
        most = acceptable - cost
        peak, excess = memory(
            t, candidate, proposed, budget, firsts, wanted, taken_at, replayed, profile, peak_price, excess_price, most
        )
        after = cost + peak_price * max(0, peak - budget) + excess_price * excess
        if after <= acceptable:
            seq[:proposed] = candidate[:proposed]
            length, energy = proposed, after
            if peak <= budget and cost < best_cost - 1e-12:
                best[:length] = seq[:length]
                best_length, best_cost = length, cost
    return length, best_length, best_cost
