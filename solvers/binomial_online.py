"""Online checkpointing: dynamic checkpointing of a loop whose number of steps is not known before it ends.

Wang, Moin, Iaccarino: *Minimal repetition dynamic checkpointing algorithm for unsteady adjoint calculation*, SIAM J.
Sci. Comput. 31 (2009), by their levels: as long as slots are free every state is stored, at level 0. Then a state that
has a later one of a higher level is *dispensable*: the latest of these makes room for the new state, at level 0. If
there is none, the newest stored state moves on to the new one, one level up. Stumm, Walther (2010) study the same task.

When the loop ends, each gap between stored states is reversed by the optimal schedule of :mod:`solvers.binomial`, with
the slots that are free by then. Counting as there, and since nobody knew which step was the last, it is not recorded
when it first runs: n steps of the sweep, then the extra ones of the gaps, then n recordings.

*Bound*: with the repetition number r of n steps in s ≥ 2 slots no step runs forward more than r + 2 times, the last
recording included; that is one more than if n is known, the price of the sweep. Tested for all n up to 400; so is that
the extra steps are at most 1.5 times the optimum's for known n, plus one. *Limits*: with a single slot nothing can be
placed, and the bound is the trivial one. Equal steps; slots hold states only.
"""

from __future__ import annotations

from collections.abc import Iterator

from solvers.binomial import Action, Free, Store, reversal, split


class OnlineCheckpoints:
    """Decides, as a loop goes on, which states to store; then how to reverse it."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}; the state at the start needs one, so give at least 1")
        self.slots = slots
        self.n_arrived = 0
        self._stored: list[tuple[int, int]] = []  # (step, level), in order

    def arrive(self) -> Iterator[Action]:
        """What to do with the state in hand, before the next step is run; to be called before every step, in order."""
        step = self.n_arrived
        self.n_arrived += 1
        if len(self._stored) < self.slots:
            self._stored.append((step, 0))
            yield Store(step)
            return
        if self.slots == 1:
            return
        position = self._dispensable()
        level = 0
        if position is None:
            position = len(self._stored) - 1
            level = self._stored[position][1] + 1
        yield Free(self._stored.pop(position)[0])
        self._stored.append((step, level))
        yield Store(step)

    def reverse(self) -> Iterator[Action]:
        """The reversal of all steps that have been run; nothing is in hand at its start."""
        end = self.n_arrived
        while self._stored:
            step, _ = self._stored.pop()
            yield from reversal(end - step, self.slots - len(self._stored), split, start=step, stored=True)
            end = step
        self.n_arrived = 0

    def _dispensable(self) -> int | None:
        """The latest stored state, but the start, that has a later one of a higher level."""
        highest = -1
        for position in range(len(self._stored) - 1, 0, -1):
            level = self._stored[position][1]
            if level < highest:
                return position
            highest = level
        return None
