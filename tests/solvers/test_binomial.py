"""Binomial checkpointing: golden counts, the closed form against a dynamic programme, and an interpreter as judge."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy
import pytest

from solvers.binomial import (
    Action,
    Advance,
    Free,
    Record,
    Restore,
    Reverse,
    Store,
    beta,
    extra_steps,
    repetition_number,
    revolve,
    split,
    total_steps,
)
from solvers.binomial_mixed import MixedTable, mixed, mixed_total_steps

GOLDEN = [
    # steps, slots, repetition number, extra steps, all steps, all steps of the mixed schedule where it is known
    (10, 1, 9, 45, 55, 54),
    (10, 3, 2, 15, 25, 19),
    (10, 5, 2, 13, 23, 15),
    (10, 10, 1, 9, 19, 10),
    (10, 20, 1, 9, 19, 10),
    (50, 1, 49, 1225, 1275, 1274),
    (50, 3, 5, 180, 230, 209),
    (50, 5, 3, 122, 172, 138),
    (50, 10, 2, 88, 138, 94),
    (50, 20, 2, 78, 128, 81),
    (100, 1, 99, 4950, 5050, 5049),
    (100, 3, 7, 490, 590, 554),
    (100, 5, 4, 316, 416, 352),
    (100, 10, 3, 222, 322, 237),
    (100, 20, 2, 178, 278, 184),
    (500, 1, 499, 124_750, 125_250, None),
    (500, 3, 13, 4680, 5180, None),
    (500, 5, 7, 2576, 3076, None),
    (500, 10, 4, 1636, 2136, None),
    (500, 20, 3, 1247, 1747, None),
    (1000, 1, 999, 499_500, 500_500, None),
    (1000, 3, 17, 12_155, 13_155, None),
    (1000, 5, 8, 6284, 7284, None),
    (1000, 10, 4, 3636, 4636, None),
    (1000, 20, 3, 2747, 3747, None),
    (4000, 12, 5, 17_620, 21_620, None),
]


@dataclass
class Judged:
    """What an interpreter that knows only what actions mean has counted."""

    advances: int = 0
    records: int = 0
    peak_slots: int = 0


def judge(actions: Iterable[Action], n_steps: int) -> Judged:
    """Run the actions on states that are numbers; every step must be reversed once, from the last to the first."""
    result = Judged()
    hand: int | None = 0
    stored: set[int] = set()
    recorded: set[int] = set()
    due = n_steps - 1
    for action in actions:
        match action:
            case Advance(start, stop):
                assert hand == start < stop <= n_steps
                hand = stop
                result.advances += stop - start
            case Store(step):
                assert hand == step
                assert step not in stored
                stored.add(step)
            case Restore(step):
                assert step in stored
                hand = step
            case Free(step):
                stored.remove(step)
            case Record(step):
                assert hand == step
                assert step not in recorded
                recorded.add(step)
                hand = step + 1
                result.records += 1
            case Reverse(step):
                assert step == due
                recorded.remove(step)
                due -= 1
                hand = None
        in_hand = isinstance(action, Record) and action.step == due  # the record that is reversed next
        result.peak_slots = max(result.peak_slots, len(stored) + len(recorded) - in_hand)
    assert due == -1
    assert not stored
    assert not recorded
    return result


@functools.cache
def optimum(n_steps: int, slots: int) -> int:
    """The extra steps by trying every split."""
    if n_steps <= 1:
        return 0
    if slots == 1:
        return n_steps * (n_steps - 1) // 2
    return min(m + optimum(n_steps - m, slots - 1) + optimum(m, slots) for m in range(1, n_steps))


@pytest.mark.parametrize(("n", "s", "r", "extra", "total", "by_mixed"), GOLDEN)
def test_golden_counts(n: int, s: int, r: int, extra: int, total: int, by_mixed: int | None) -> None:
    assert (repetition_number(n, s), extra_steps(n, s), total_steps(n, s)) == (r, extra, total)
    judged = judge(revolve(n, s), n)
    assert (judged.advances, judged.records, judged.advances + judged.records) == (extra, n, total)
    assert judged.peak_slots == min(s, n - 1)
    if by_mixed is not None:
        assert mixed_total_steps(n, s) == by_mixed
        judged = judge(mixed(n, s), n)
        assert judged.advances + judged.records == by_mixed
        assert judged.peak_slots <= s


def test_the_closed_form_is_the_optimum_on_a_grid() -> None:
    for n in range(121):
        for s in range(1, 16):
            assert extra_steps(n, s) == optimum(n, s), (n, s)


def test_the_closed_form_is_the_optimum_on_a_wide_grid() -> None:
    """Up to 1,000 steps and 40 slots, by the recursion for all n at once."""
    steps = numpy.arange(1001)
    previous = steps * (steps - 1) // 2  # one slot
    for s in range(2, 41):
        optimal = numpy.zeros(1001, dtype=numpy.int64)
        for n in range(2, 1001):
            optimal[n] = (steps[1:n] + previous[n - 1 : 0 : -1] + optimal[1:n]).min()
        assert [extra_steps(n, s) for n in range(1001)] == optimal.tolist()
        previous = optimal


def test_every_sequence_of_a_grid_is_valid_and_optimal() -> None:
    for n in range(61):
        for s in range(1, 12):
            judged = judge(revolve(n, s), n)
            assert (judged.advances, judged.records) == (extra_steps(n, s), n)
            assert judged.peak_slots <= s


def test_no_step_runs_more_often_than_the_repetition_number_allows() -> None:
    for n, s in ((10, 3), (84, 3), (85, 3), (200, 4), (1000, 6)):
        runs = [0] * n
        for action in revolve(n, s):
            if isinstance(action, Advance):
                for step in range(action.start, action.stop):
                    runs[step] += 1
            elif isinstance(action, Record):
                runs[action.step] += 1
        assert max(runs) == repetition_number(n, s) + 1


def test_golden_sequence() -> None:
    # 4 steps with 2 slots, by hand: 2 + 1 steps to get to the last one, and 1 more to get to step 1
    expected = [
        Store(0), Advance(0, 2), Store(2), Advance(2, 3), Record(3), Reverse(3),
        Restore(2), Free(2), Record(2), Reverse(2),
        Restore(0), Advance(0, 1), Record(1), Reverse(1),
        Restore(0), Free(0), Record(0), Reverse(0),
    ]  # fmt: skip
    assert list(revolve(4, 2)) == expected
    assert extra_steps(4, 2) == 4


def test_every_split_in_the_stated_range_is_optimal() -> None:
    for n in range(2, 60):
        for s in range(2, 8):
            r = repetition_number(n, s)
            for m in range(1, n):
                inside = beta(s, r - 2) <= m <= beta(s, r - 1) and beta(s - 1, r - 1) <= n - m <= beta(s - 1, r)
                if inside:
                    assert m + optimum(n - m, s - 1) + optimum(m, s) == optimum(n, s)
            chosen = split(n, s)
            assert chosen + optimum(n - chosen, s - 1) + optimum(chosen, s) == optimum(n, s)


def test_huge_loops_are_instant_and_lazy() -> None:
    n = 10**30
    assert extra_steps(n, 1) == n * (n - 1) // 2
    assert extra_steps(n, 2 * n) == n - 1
    r = repetition_number(n, 50)
    assert beta(50, r - 1) < n <= beta(50, r)
    assert len(list(islice(revolve(10**15, 40), 60))) == 60


def test_long_loops_need_no_recursion() -> None:
    assert judge(revolve(20_000, 2), 20_000).advances == extra_steps(20_000, 2)
    assert judge(revolve(5_000, 5_000), 5_000).advances == 4_999


@functools.cache
def mixed_optimum(n_steps: int, slots: int) -> float:
    """The recursion again, written down as it stands in the docstring."""
    if n_steps <= 1:
        return n_steps
    if slots == 0:
        return float("inf")
    by_state = min(m + mixed_optimum(n_steps - m, slots - 1) + mixed_optimum(m, slots) for m in range(1, n_steps))
    return min(1 + mixed_optimum(n_steps - 1, slots - 1), by_state)


def test_mixed_is_valid_optimal_and_never_worse() -> None:
    for n in range(45):
        for s in range(1, 10):
            table = MixedTable.fill(n, s)
            judged = judge(table.actions(), n)
            assert judged.advances + judged.records == table.total_steps == mixed_optimum(n, s)
            assert judged.peak_slots <= s
            assert n <= table.total_steps <= total_steps(n, s)
            assert (table.total_steps == n) == (s >= n - 1)


@pytest.mark.parametrize(("n", "s", "text"), [(-1, 3, "n_steps is -1"), (5, 0, "slots is 0"), (5, -2, "slots is -2")])
def test_bad_input(n: int, s: int, text: str) -> None:
    for function in (extra_steps, total_steps, repetition_number, revolve, mixed, mixed_total_steps):
        with pytest.raises(ValueError, match=text):
            function(n, s)
