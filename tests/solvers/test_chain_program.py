"""Beaumont et al. 2019: golden makespans, brute force over persistent schedules, and plans replayed byte for byte."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from solvers.chain_program import Chain, ChainProgram, Operation, Option

INF = float("inf")


@dataclass(frozen=True)
class Golden:
    """A chain, and by budget the makespan that another implementation of the programme finds."""

    chain: Chain
    makespans: dict[int, float]


def golden(ftime: str, btime: str, x: str, xbar: str, ftmp: str, btmp: str, makespans: str) -> Golden:
    """Its convention, found by fitting: the gradients count only in the backward that makes them."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(number) for number in text.split())

    sizes = numbers(x)
    backward = tuple(made + scratch for made, scratch in zip(sizes, numbers(btmp), strict=False))
    zeros = (0,) * len(sizes)
    chain = Chain(numbers(ftime), numbers(btime), sizes, numbers(xbar), numbers(ftmp), backward, delta=zeros)
    pairs = (item.split(":") for item in makespans.split())
    return Golden(chain, {int(budget): float(seconds) for budget, seconds in pairs})


GOLDEN = (
    golden(
        ftime="11 5 13 2 3",
        btime="22 12 26 5 6",
        x="1 4 4 1 2 1",
        xbar="1 12 10 1 3 4",
        ftmp="2 2 2 0 2",
        btmp="3 0 1 0 1",
        makespans="8:inf 10:inf 12:inf 16:inf 20:inf 24:121 28:116 32:110 36:105 40:105",
    ),
    golden(
        ftime="10 14 5 18 4 19 10 18",
        btime="21 28 11 38 8 38 20 37",
        x="4 6 5 4 3 4 5 4 3",
        xbar="4 10 8 6 6 5 9 12 10",
        ftmp="1 2 1 1 2 0 0 2",
        btmp="3 1 2 1 3 3 0 0",
        makespans="16:inf 20:inf 24:inf 32:403 40:356 48:338 56:328 64:318 72:308 81:299",
    ),
    golden(
        ftime="18 19 11 11 12 20 16 19 15 3",
        btime="36 40 25 22 24 42 35 40 33 8",
        x="1 4 3 2 5 1 4 1 2 3 2",
        xbar="1 7 9 8 12 2 6 8 8 11 6",
        ftmp="0 1 2 1 2 1 1 2 1 0",
        btmp="1 0 1 1 1 1 0 3 1 2",
        makespans="17:inf 22:632 26:601 35:551 44:521 52:505 61:486 70:471 79:460 88:449",
    ),
    golden(
        ftime="10 1 5 14 18 12 20 19 11 5 17 20 2 15 18",
        btime="23 5 13 31 36 27 43 38 23 10 35 43 5 30 38",
        x="5 1 1 1 5 2 5 1 3 5 1 1 2 5 4 2",
        xbar="5 5 6 6 12 3 6 8 10 12 8 5 3 7 5 7",
        ftmp="2 1 1 2 0 2 0 0 2 1 0 2 2 0 2",
        btmp="2 0 2 2 1 2 1 2 1 1 1 3 1 1 3",
        makespans="23:inf 29:803 35:742 47:697 59:665 70:635 82:619 94:604 106:593 118:587",
    ),
    golden(
        ftime="12 1 1 9 16 9 7 20 12 15 12 12 3 8 4 8 16 7 11 7",
        btime="27 2 5 20 32 18 17 41 27 31 27 26 6 19 11 19 32 15 23 15",
        x="1 2 5 4 6 2 5 5 4 6 3 2 5 5 2 1 1 6 6 1 5",
        xbar="1 4 11 7 9 2 9 8 8 14 6 7 9 13 8 3 1 11 13 9 11",
        ftmp="2 0 2 0 2 2 0 1 0 2 0 0 0 0 1 2 2 0 2 0",
        btmp="2 3 0 0 1 1 2 0 0 3 0 0 3 2 1 2 3 3 1 2",
        makespans="35:839 43:777 52:746 70:707 87:682 105:654 122:632 140:615 157:605 175:603",
    ),
    golden(
        ftime="18 7 15 5 14 4 13 15 11 3 8 14 3 7 10 4 5 12 5 9 5 15 8 4 13 16 6 8 6 14",
        btime="39 16 33 11 30 10 26 32 22 8 19 31 6 17 22 10 10 24 11 18 10 32 18 8 27 34 13 19 14 31",
        x="2 5 5 5 4 6 3 1 3 1 6 2 4 1 3 1 6 1 3 1 5 2 1 3 1 4 1 3 5 4 3",
        xbar="2 7 5 13 7 7 5 5 3 3 9 6 8 9 6 5 13 9 5 5 10 2 5 3 1 4 9 11 8 12 10",
        ftmp="0 1 0 2 2 1 2 1 2 1 2 1 2 0 0 1 0 2 2 2 0 1 1 0 0 0 0 2 2 1",
        btmp="3 1 0 0 3 2 1 2 0 3 1 1 2 3 0 2 2 2 2 1 0 2 1 2 1 0 2 3 0 3",
        makespans="43:1126 54:1079 65:1045 87:1006 109:974 130:946 152:918 174:899 196:887 218:878",
    ),
)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{len(case.chain)} stages")
def test_golden_makespans(case: Golden) -> None:
    chain = case.chain
    program = ChainProgram(chain, max(case.makespans))
    equal = 0
    for budget, expected in case.makespans.items():
        found = program.makespan(budget)
        assert found <= expected
        equal += found == expected
        plan = program.plan(budget)
        if plan is None:
            assert found == INF
        else:
            assert replay(chain, plan)[0] == found
            assert replay(chain, plan)[1] <= budget
    assert equal >= len(case.makespans) // 2
    assert program.makespan(chain.store_all_bytes) == sum(chain.ftime) + sum(chain.btime)


def replay(chain: Chain, plan: list[Operation]) -> tuple[float, int]:
    """Seconds and peak of a plan; asserts that whatever an operation reads is there, and that nothing is left."""
    boundaries, saved = {0}, dict[int, int]()  # ā(i) and the option that made it
    due, seconds, peak = len(chain) - 1, 0.0, 0

    def stored() -> int:
        kept = sum(chain.options_of(i - 1)[option].xbar for i, option in saved.items())
        return sum(chain.x[i] for i in boundaries) + kept

    for operation in plan:
        kind, i = operation.kind, operation.stage
        option = chain.options_of(i)[operation.option]
        assert i in boundaries or i in saved
        if kind == "backward":
            assert i == due
            assert saved[i + 1] == operation.option
            peak = max(peak, stored() + chain.deltas[i + 1] + option.btmp)
            del saved[i + 1]
            boundaries -= {i, i + 1}
            due, seconds = due - 1, seconds + option.btime
            continue
        made = option.xbar + chain.all_tmps[i] if kind == "all" else chain.x[i + 1] + chain.ftmp[i]
        peak = max(peak, stored() + made + chain.deltas[due + 1])
        if kind == "all":
            saved[i + 1] = operation.option
        else:
            boundaries.add(i + 1)
        if kind == "drop":
            assert i in boundaries
            boundaries.discard(i)
        seconds += chain.ftime[i]
    assert (due, saved) == (-1, {})
    return seconds, peak


@dataclass(frozen=True, order=True)
class State:
    """What is stored: a(i), ā(i) with its option, the a(i) in hand that is not (yet) kept; which backward is due."""

    due: int
    hand: int
    kept: frozenset[int]
    saved: frozenset[tuple[int, int]]


def brute_force(chain: Chain, budget: int) -> float:
    """The optimum over persistent schedules, by Dijkstra's algorithm."""
    start = State(len(chain) - 1, 0, frozenset(), frozenset())
    best, tickets = {start: 0.0}, itertools.count()
    queue = [(0.0, next(tickets), start)]
    while queue:
        seconds, _, state = heapq.heappop(queue)
        if state.due < 0:
            return seconds
        if seconds > best[state]:
            continue
        for price, need, following in _successors(chain, state):
            if need <= budget and seconds + price < best.get(following, INF):
                best[following] = seconds + price
                heapq.heappush(queue, (seconds + price, next(tickets), following))
    return INF


def _successors(chain: Chain, state: State) -> Iterator[tuple[float, int, State]]:
    saved = dict(state.saved)
    stored = sum(chain.x[i] for i in state.kept)
    stored += sum(chain.options_of(i - 1)[option].xbar for i, option in state.saved)
    stored += chain.x[state.hand] if state.hand >= 0 else 0
    delta, due, hand = chain.deltas[state.due + 1], state.due, state.hand
    if hand > 0:
        yield 0.0, 0, State(due, -1, state.kept, state.saved)
    if due + 1 in saved and (due in state.kept or due in saved):
        option = chain.options_of(due)[saved[due + 1]]
        after = State(due - 1, -1, state.kept - {due}, state.saved - {(due + 1, saved[due + 1])})
        if hand < 0:
            yield option.btime, stored + delta + option.btmp, after
    for i in range(due + 1):
        if i == hand or (hand < 0 and (i in state.kept or i in saved)):
            kept = state.kept if i in saved else state.kept | {i}
            small = stored + delta + chain.x[i + 1] + chain.ftmp[i]
            for number, option in enumerate(chain.options_of(i)):
                if i + 1 not in saved:
                    large = stored + delta + option.xbar + chain.all_tmps[i]
                    yield chain.ftime[i], large, State(due, -1, kept, state.saved | {(i + 1, number)})
            if i < due and i + 1 not in state.kept:
                yield chain.ftime[i], small, State(due, i + 1, kept, state.saved)
                if i == hand:
                    yield chain.ftime[i], small, State(due, i + 1, state.kept, state.saved)


def with_options(chain: Chain, rng: random.Random) -> Chain:
    """The chain, with up to two options for each stage that keep less and take longer."""
    rows = [
        tuple(
            Option(
                rng.randint(chain.x[i + 1], chain.xbar[i + 1]), chain.btime[i] + rng.randint(0, 6), rng.randint(0, 6)
            )
            for _ in range(rng.randint(0, 2))
        )
        for i in range(len(chain))
    ]
    return dataclasses.replace(chain, options=tuple(rows))


def random_chain(rng: random.Random, stages: int) -> Chain:
    def draw(count: int, low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randint(low, high) for _ in range(count))

    x = draw(stages + 1, 0, 4)
    xbar = tuple(size + rng.randint(0, 6) for size in x)
    ftime, btime = draw(stages, 0, 9), draw(stages, 0, 9)
    delta = draw(stages + 1, 0, 4) if rng.random() < 0.5 else None
    all_tmp = draw(stages, 0, 3) if rng.random() < 0.5 else None
    return Chain(ftime, btime, x, xbar, draw(stages, 0, 3), draw(stages, 0, 4), delta, all_tmp)


@pytest.mark.parametrize("seed", range(60))
def test_equal_to_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    chain = random_chain(rng, rng.randint(1, 5))
    program = ChainProgram(chain, chain.store_all_bytes)
    for budget in range(0, chain.store_all_bytes + 2, 2):
        assert program.makespan(budget) == brute_force(chain, budget)
        plan = program.plan(budget)
        if plan is not None:
            seconds, peak = replay(chain, plan)
            assert seconds == program.makespan(budget)
            assert peak <= budget


@pytest.mark.parametrize("seed", range(40))
def test_options_equal_to_brute_force(seed: int) -> None:
    rng = random.Random(1000 + seed)
    plain = random_chain(rng, rng.randint(1, 4))
    chain = with_options(plain, rng)
    program, without = ChainProgram(chain, chain.store_all_bytes), ChainProgram(plain, chain.store_all_bytes)
    for budget in range(0, chain.store_all_bytes + 2, 2):
        assert program.makespan(budget) == brute_force(chain, budget)
        assert program.makespan(budget) <= without.makespan(budget)
        plan = program.plan(budget)
        if plan is not None:
            seconds, peak = replay(chain, plan)
            assert seconds == program.makespan(budget)
            assert peak <= budget


def test_units_are_rounded_up() -> None:
    chain = GOLDEN[3].chain
    coarse = chain.discretised(4)
    assert (chain.x[0], coarse.x[0], chain.discretised(1)) == (5, 2, chain)
    program, fine = ChainProgram(coarse, coarse.store_all_bytes), ChainProgram(chain, chain.store_all_bytes)
    for budget in range(coarse.store_all_bytes + 1):
        assert program.makespan(budget) >= fine.makespan(4 * budget)
        plan = program.plan(budget)
        assert plan is None or replay(chain, plan)[1] <= 4 * budget


def test_a_hundred_stages() -> None:
    """5,000 sub-chains × 500 units; also the size at which a plan is 1,000 operations long."""
    rng = random.Random(1)
    chain = random_chain(rng, 100)
    program = ChainProgram(chain, 500)
    seconds = [program.makespan(budget) for budget in range(0, 501, 20)]
    assert seconds == sorted(seconds, reverse=True)
    budget = next(b for b in range(501) if program.makespan(b) < INF)
    plan = program.plan(budget)
    assert plan is not None
    assert replay(chain, plan) == (program.makespan(budget), budget)


def test_empty_chain_and_bad_chains() -> None:
    empty = Chain((), (), (3,), (3,), (), ())
    assert ChainProgram(empty, 0).makespan(0) == 0.0
    assert ChainProgram(empty, 0).plan(0) == []
    with pytest.raises(ValueError, match="btime has 2 entries; a chain of 1 stages needs 1"):
        Chain((1.0,), (1.0, 2.0), (1, 1), (1, 1), (0,), (0,))
    with pytest.raises(ValueError, match="options has 2 entries; a chain of 1 stages needs 1"):
        Chain((1.0,), (1.0,), (1, 1), (1, 1), (0,), (0,), options=((), ()))
    with pytest.raises(ValueError, match="options has an entry that is negative"):
        Chain((1.0,), (1.0,), (1, 1), (1, 1), (0,), (0,), options=((Option(1, -1.0, 0),),))
    with pytest.raises(ValueError, match="ftime has an entry that is negative or not a number"):
        Chain((float("nan"),), (1.0,), (1, 1), (1, 1), (0,), (0,))


def test_import_is_light() -> None:
    code = "import sys, solvers.heterogeneous_chain; print({'torch', 'ortools', 'numba', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
