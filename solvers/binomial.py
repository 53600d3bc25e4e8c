"""Binomial checkpointing: revolve, treeverse, optimal checkpointing of loops, reversal of a chain of equal steps.

Griewank, Walther: *Algorithm 799: revolve: an implementation of checkpointing for the reverse or adjoint mode of
computational differentiation*, ACM TOMS 26 (2000); the schedule goes back to Griewank (1992), its optimality to Grimm,
Pottier, Rostaing-Schmidt (1996). A loop of n equal steps is reversed with s *slots*, each of which holds one state.

*Closed form.* β(s, r) = C(s + r, s) steps can be reversed if no step runs forward more than r + 1 times. With the
*repetition number* r, the smallest one with n ≤ β(s, r), the fewest *extra* forward steps are

    t(n, s) = r·n − β(s + 1, r − 1)                                                                  (the theorem)

*Counting convention.* The state at the start needs a slot too, like any other that is returned to. A step runs
forward either to get to the next state (:class:`Advance`) or to record what its reversal needs (:class:`Record`); the
*extra* ones are those of the first kind, and together with the n recordings that nobody can avoid they are the
*total*, t(n, s) + n. 4000 steps with 12 slots: 17,620 extra, 21,620 in all. The state in hand, and the record of the
step that is about to be reversed, need no slot.

*Optimal among* all schedules with n and s known, equal steps, and slots that hold states. Slots beyond n − 1 are of no
use. Where a slot may hold a step's record, :mod:`solvers.binomial_mixed` does better. *Limits*: steps of unequal
seconds or states of unequal bytes are not looked at, n must be known at the start, every slot is equally fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import comb


@dataclass(frozen=True, slots=True)
class Advance:
    """Run the steps `start` … `stop - 1` forward, and record nothing: the state in hand is then that before `stop`."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Store:
    """Put the state in hand, the one before `step`, into a free slot."""

    step: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Take the stored state before `step` in hand; it stays in its slot."""

    step: int


@dataclass(frozen=True, slots=True)
class Free:
    """Release the slot of the state before `step`."""

    step: int


@dataclass(frozen=True, slots=True)
class Record:
    """Run `step` forward from the state in hand, and keep the record (the tape) that its reversal needs.

    The record takes a slot, unless the next action reverses it.
    """

    step: int


@dataclass(frozen=True, slots=True)
class Reverse:
    """Run the backward of `step` on its record, and release the record."""

    step: int


Action = Advance | Store | Restore | Free | Record | Reverse


def beta(slots: int, repetitions: int) -> int:
    """β(s, r) = C(s + r, s): the most steps of which none has to run more than r + 1 times."""
    return comb(slots + repetitions, slots) if repetitions >= 0 else 0


def repetition_number(n_steps: int, slots: int) -> int:
    """The smallest r with n ≤ β(s, r), in logarithmically many evaluations of β."""
    _check(n_steps, slots)
    if n_steps <= 1:
        return 0
    high = 1
    while beta(slots, high) < n_steps:
        high *= 2
    low = high // 2  # β(s, low) < n ≤ β(s, high)
    while high - low > 1:
        middle = (low + high) // 2
        if beta(slots, middle) < n_steps:
            low = middle
        else:
            high = middle
    return high


def extra_steps(n_steps: int, slots: int) -> int:
    """t(n, s): the forward steps of the optimal schedule that record nothing."""
    r = repetition_number(n_steps, slots)
    return r * n_steps - beta(slots + 1, r - 1)


def total_steps(n_steps: int, slots: int) -> int:
    """All forward steps of the optimal schedule, t(n, s) + n: the extra ones and one recording of each step."""
    return extra_steps(n_steps, slots) + n_steps


def split(n_steps: int, slots: int) -> int:
    """How far to advance from a stored state before the next one is stored; n ≥ 2, `slots` with that of the start.

    With m steps left of the next state, t(n, s) = min over m of m + t(n − m, s − 1) + t(m, s). Every m is optimal for
    which β(s, r − 2) ≤ m ≤ β(s, r − 1) and β(s − 1, r − 1) ≤ n − m ≤ β(s − 1, r); the largest one is taken.
    """
    if slots == 1:
        return n_steps - 1
    r = repetition_number(n_steps, slots)
    return min(beta(slots, r - 1), n_steps - beta(slots - 1, r - 1))


def revolve(n_steps: int, slots: int) -> Iterator[Action]:
    """The optimal schedule, action by action; the memory that it needs grows with the slots alone."""
    _check(n_steps, slots)
    return reversal(n_steps, slots, split)


def reversal(
    n_steps: int, slots: int, decide: Callable[[int, int], int], *, start: int = 0, stored: bool = False
) -> Iterator[Action]:
    """The schedule that follows `decide`, by an explicit stack: chains of any length.

    **Arguments:**

    - `decide`: for n ≥ 2 steps and s free slots: how many steps to advance after the state in hand has been stored, or
      0 to record the first step instead, in one of the slots.
    - `start`: the first of the steps. `stored`: the state before it is in one of the slots, and not in hand.
    """
    if n_steps == 0:
        return
    # (first step, steps, slots, whether the state before the first step is stored); no steps: a record to be reversed.
    stack = [(start, n_steps, slots, stored)]
    while stack:
        start, length, free, stored = stack.pop()
        if length == 0:
            yield Reverse(start)
            continue
        advance = decide(length, free) if length > 1 else 0
        if stored:
            yield Restore(start)
        if advance == 0:
            if stored:
                yield Free(start)
            yield Record(start)
            stack.append((start, 0, 0, False))
            if length > 1:
                stack.append((start + 1, length - 1, free - 1, False))
        else:
            if not stored:
                yield Store(start)
            yield Advance(start, start + advance)
            stack.append((start, advance, free, True))
            stack.append((start + advance, length - advance, free - 1, False))


def _check(n_steps: int, slots: int) -> None:
    if n_steps < 0:
        raise ValueError(f"n_steps is {n_steps}; a loop has 0 steps or more")
    if slots < 1:
        raise ValueError(f"slots is {slots}; the state at the start needs one, so give at least 1")
