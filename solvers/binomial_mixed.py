"""Mixed binomial checkpointing: each slot holds a state or a whole step's record (its tape), whichever is better.

Maddison: *On the implementation of checkpointing with high-level algorithmic differentiation*, arXiv 2305.09568
(2023), the schedule for mixed data. A stored record saves the rerun that a stored state would need, but serves one
step only. Worth it if a step's record is not larger than a state, as with steps of a few operators. Counting as in
:mod:`solvers.binomial`: the state in hand and the record that is reversed next need no slot. Unlike there, the total
comes down to n as soon as s ≥ n − 1.

With the start in hand, n steps and s free slots take p(n, s) forward steps in all:

    p(1, s) = 1,   p(n, 0) = ∞ for n ≥ 2,   and else the smaller of
    1 + p(n − 1, s − 1)                               record the first step, in a slot
    min over m of m + p(n − m, s − 1) + p(m, s)       store the start, advance by m, come back to it

*Optimal* by exhaustion of this recursion. *Limits*: a dynamic programme, O(n²·s) time (vectorised: 1000 steps with 20
slots in about a tenth of a second) and O(n·s) memory; for very long loops :mod:`solvers.binomial` has a closed form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import numpy.typing

from solvers.binomial import Action, reversal

_INFINITE = 2**60

Integers = numpy.typing.NDArray[numpy.int64]


@dataclass(frozen=True)
class MixedTable:
    """The filled table: `totals[s, n]` is p(n, s), `advances[s, n]` the m that attains it, 0 to record."""

    totals: Integers
    advances: Integers

    @classmethod
    def fill(cls, n_steps: int, slots: int) -> MixedTable:
        """Solve the recursion up to n steps and s slots."""
        if n_steps < 0:
            raise ValueError(f"n_steps is {n_steps}; a loop has 0 steps or more")
        if slots < 1:
            raise ValueError(f"slots is {slots}; give at least 1")
        slots = min(slots, max(n_steps - 1, 1))  # more are of no use
        totals: Integers = numpy.full((slots + 1, n_steps + 1), _INFINITE, dtype=numpy.int64)
        advances: Integers = numpy.zeros((slots + 1, n_steps + 1), dtype=numpy.int64)
        totals[:, 0] = 0
        totals[:, 1:2] = 1
        steps = numpy.arange(n_steps + 1, dtype=numpy.int64)
        for s in range(1, slots + 1):
            left = totals[s] + steps  # m + p(m, s): filled as n grows
            for n in range(2, n_steps + 1):
                options = left[1:n] + totals[s - 1, n - 1 : 0 : -1]
                m = int(options.argmin()) + 1
                by_state, by_record = int(options[m - 1]), 1 + int(totals[s - 1, n - 1])
                if by_state < by_record:
                    totals[s, n], advances[s, n] = by_state, m
                else:
                    totals[s, n] = by_record
                left[n] = totals[s, n] + n
        return cls(totals, advances)

    @property
    def n_steps(self) -> int:
        """The most steps in the table."""
        return self.totals.shape[1] - 1

    @property
    def slots(self) -> int:
        """The most slots in the table; more would not help."""
        return self.totals.shape[0] - 1

    @property
    def total_steps(self) -> int:
        """p(n, s): all forward steps of the optimal schedule, each step's recording among them."""
        return int(self.totals[-1, -1])

    def actions(self) -> Iterator[Action]:
        """The optimal schedule, action by action."""
        return reversal(self.n_steps, self.slots, lambda n, s: int(self.advances[s, n]))


def mixed_total_steps(n_steps: int, slots: int) -> int:
    """All forward steps of the optimal mixed schedule."""
    return MixedTable.fill(n_steps, slots).total_steps


def mixed(n_steps: int, slots: int) -> Iterator[Action]:
    """The optimal mixed schedule, action by action."""
    return MixedTable.fill(n_steps, slots).actions()
