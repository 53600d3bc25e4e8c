"""Online checkpointing: valid at every end of the loop, within the slots, and within the stated bounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from solvers.binomial import Action, Advance, Record, extra_steps, repetition_number
from solvers.binomial_online import OnlineCheckpoints
from tests.solvers.test_binomial import judge


def online(n_steps: int, slots: int, *, last_in_hand: bool = False) -> Iterator[Action]:
    """All actions of a loop that happens to end after `n_steps`; without the sweep's last step, if that is in hand."""
    checkpoints = OnlineCheckpoints(slots)
    for step in range(n_steps):
        yield from checkpoints.arrive()
        if not (last_in_hand and step == n_steps - 1):
            yield Advance(step, step + 1)
    yield from checkpoints.reverse(last_in_hand=last_in_hand)


@pytest.mark.parametrize("last_in_hand", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 10, 20])
def test_valid_and_within_the_bounds(slots: int, last_in_hand: bool) -> None:
    for n in [*range(0, 120), *range(120, 401, 7 if slots > 1 else 40)]:
        actions = list(online(n, slots, last_in_hand=last_in_hand))
        judged = judge(actions, n)
        assert judged.peak_slots <= slots
        assert judged.records == n
        extra, optimum = judged.advances + (last_in_hand and n > 0), extra_steps(n, slots)
        assert extra >= optimum
        if slots >= 2:
            assert extra <= 1.5 * optimum + 2
            assert most_runs(actions, n) <= repetition_number(n, slots) + 2
        if last_in_hand and n < (slots + 1) * (slots + 2) // 2:
            assert extra <= optimum + 2


@pytest.mark.parametrize(
    ("slots", "again"),
    [
        (4, "3 2 1 0"),
        (4, "3 4 3 2 1 0"),
        (4, "5 2 3 4 3 2 1 0"),
        (4, "6 5 2 3 4 3 2 0 1 0"),
        (4, "7 6 5 0 1 2 3 4 3 2 1 0"),
        (4, "7 8 7 6 5 0 1 2 3 4 3 2 1 0"),
        (4, "9 6 7 8 7 6 5 0 1 2 3 4 3 2 1 0"),
        (4, "10 9 5 6 7 8 7 6 5 0 1 2 3 4 3 2 1 0"),
        (4, "10 11 10 9 5 6 7 8 7 6 5 0 1 2 3 4 3 2 1 0"),
        (4, "12 9 10 11 10 9 5 6 7 8 7 6 5 0 1 2 3 4 3 2 1 0"),
        (4, "12 13 12 9 10 11 10 9 5 6 7 8 7 6 5 0 1 2 3 4 3 2 1 0"),
        (2, "3 4 3 0 1 2 1 0"),
        (1, "0 1 2 0 1 0"),
        (1, "0 1 2 3 4 0 1 2 3 0 1 2 0 1 0"),
        (9, "4 3 2 1 0"),
    ],
)
def test_golden_orders(slots: int, again: str) -> None:
    """The steps that run after the sweep, in order; with 4 slots those of Stumm and Walther (2010), figure 2.2.

    Erratum: for the stored states that the figure shows, it gives one step more than there are.
    """
    steps = [int(step) for step in again.split()]
    n = max(steps) + 1
    found: list[int] = []
    for action in list(online(n, slots))[_length_of_sweep(n, slots) :]:
        match action:
            case Advance(start, stop):
                found += range(start, stop)
            case Record(step):
                found.append(step)
            case _:
                pass
    assert found == steps


def _length_of_sweep(n_steps: int, slots: int) -> int:
    checkpoints = OnlineCheckpoints(slots)
    return sum(1 + len(list(checkpoints.arrive())) for _ in range(n_steps))


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
