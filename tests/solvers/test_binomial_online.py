"""Online checkpointing: valid at every end of the loop, within the slots, and within the stated bounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from solvers.binomial import Action, Advance, Record, extra_steps, repetition_number
from solvers.binomial_online import OnlineCheckpoints
from tests.solvers.test_binomial import judge


def online(n_steps: int, slots: int) -> Iterator[Action]:
    """All actions of a loop that happens to end after `n_steps`."""
    checkpoints = OnlineCheckpoints(slots)
    for step in range(n_steps):
        yield from checkpoints.arrive()
        yield Advance(step, step + 1)
    yield from checkpoints.reverse()


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 10, 20])
def test_valid_and_within_the_bounds(slots: int) -> None:
    for n in [*range(0, 120), *range(120, 401, 7 if slots > 1 else 40)]:
        actions = list(online(n, slots))
        judged = judge(actions, n)
        assert judged.peak_slots <= slots
        assert judged.records == n
        assert judged.advances >= extra_steps(n, slots)
        if slots >= 2:
            assert judged.advances <= 1.5 * extra_steps(n, slots) + 1
            assert most_runs(actions, n) <= repetition_number(n, slots) + 2


def most_runs(actions: list[Action], n_steps: int) -> int:
    runs = [0] * n_steps
    for action in actions:
        if isinstance(action, Advance):
            for step in range(action.start, action.stop):
                runs[step] += 1
        elif isinstance(action, Record):
            runs[action.step] += 1
    return max(runs, default=0)


def test_enough_slots_cost_the_sweep_alone() -> None:
    assert judge(online(30, 30), 30).advances == 30


def test_slots_must_be_there() -> None:
    with pytest.raises(ValueError, match="slots is 0"):
        OnlineCheckpoints(0)
