"""Online checkpointing: dynamic checkpointing of a loop whose number of steps is not known before it ends.

Two papers, one after the other as the loop goes on; *s* slots, the state at the start in one of them for good:

* Stumm, Walther: *New algorithms for optimal online checkpointing*, SIAM J. Sci. Comput. 32 (2010), algorithm I, while
  fewer than (s + 1)(s + 2)/2 steps have run. The states 0, s + 1, s + 1 + s, s + 1 + s + (s - 1), … are the *targets*:
  each stays from its arrival on. A target takes the slot of the newest state that is none; the states behind it those
  of the others, the oldest first; what then arrives before the next target is not stored.
* Wang, Moin, Iaccarino: *Minimal repetition dynamic checkpointing algorithm for unsteady adjoint calculation*, SIAM J.
  Sci. Comput. 31 (2009), from there on, by their levels: a state that has a later one of a higher level is
  *dispensable*, and the latest of these makes room for the new state, at level 0. If there is none, the newest stored
  state moves on to the new one, one level up. The targets begin at level 1.

When the loop ends, each gap between stored states is reversed by the optimal schedule of :mod:`solvers.binomial`, with
the slots that are free by then. Counting as there, and since nobody knew which step was the last, it is not recorded
when it first runs: n steps of the sweep, then the extra ones of the gaps, then n recordings. Who still has the state
before the last step in hand at the end saves the way back to it.

*Bound* (Wang, Moin, Iaccarino): with the repetition number r of n steps in s ≥ 2 slots no step runs forward more than
r + 2 times, the sweep and the recording included; that is one more than if n is known. With the state before the last
step in hand, and t the extra steps of the optimum for known n, there are at most t + 2 extra steps, the sweep's last
one among them, if n < (s + 1)(s + 2)/2 (Stumm, Walther), and at most 1.5 t + 2 else; tested for n up to 400. *Limits*:
with a single slot nothing can be placed, and the bound is the trivial one. Equal steps; slots hold states only.
"""

from __future__ import annotations

from collections.abc import Iterator

from solvers.binomial import Action, Free, Record, Reverse, Store, reversal, split


class OnlineCheckpoints:
    """Decides, as a loop goes on, which states to store; then how to reverse it."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}; the state at the start needs one, so give at least 1")
        self.slots = slots
        self.n_arrived = 0
        self._stored: list[tuple[int, int]] = []  # (step, level), in order
        # Of Stumm and Walther's phase: the next target, and how far behind it the one after that is.
        self._target: int = slots + 1
        self._distance: int = slots

    def arrive(self) -> Iterator[Action]:
        """What to do with the state in hand, before the next step is run; to be called before every step, in order."""
        step = self.n_arrived
        self.n_arrived += 1
        if len(self._stored) < self.slots:
            self._stored.append((step, 0 if step else 1))
            yield Store(step)
            return
        if self.slots == 1:
            return
        if self._distance > 0:
            position, level = self._by_targets(step)
        else:
            position, level = self._by_levels()
        if position is not None:
            yield Free(self._stored.pop(position)[0])
            self._stored.append((step, level))
            yield Store(step)

    def reverse(self, *, last_in_hand: bool = False) -> Iterator[Action]:
        """The reversal of all steps that have been run.

        **Arguments:**

        - `last_in_hand`: the state before the last step is in hand, and that step is recorded first. Else nothing is.
        """
        end = self.n_arrived
        if last_in_hand and end:
            end -= 1
            if self._stored[-1][0] == end:
                yield Free(self._stored.pop()[0])
            yield Record(end)
            yield Reverse(end)
        while self._stored:
            step, _ = self._stored.pop()
            yield from reversal(end - step, self.slots - len(self._stored), split, start=step, stored=True)
            end = step
        self.n_arrived = 0
        self._target, self._distance = self.slots + 1, self.slots

    def _by_targets(self, step: int) -> tuple[int | None, int]:
        """Stumm and Walther: the position among the stored ones that makes room (or `None`), and the new level."""
        others = [p for p, (_, level) in enumerate(self._stored) if level == 0]
        if step == self._target:
            self._target, self._distance = step + self._distance, self._distance - 1
            if not others:  # the last target: all slots hold targets
                return self._by_levels()
            return others[-1], 1
        newest_target = max(stored for stored, level in self._stored if level)
        old = [p for p in others if self._stored[p][0] < newest_target]
        return (old[0] if newest_target and old else None), 0

    def _by_levels(self) -> tuple[int, int]:
        """Wang, Moin and Iaccarino: the latest dispensable state, or else the newest one."""
        highest = -1
        for position in range(len(self._stored) - 1, 0, -1):
            level = self._stored[position][1]
            if level < highest:
                return position, 0
            highest = level
        return len(self._stored) - 1, self._stored[-1][1] + 1
