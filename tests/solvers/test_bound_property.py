"""The bound's property over random graphs of every family: a sample here, thousands with ``BOUND_GRAPHS=3000``.

BOUND_GRAPHS=3000 python -m pytest tests/solvers/test_bound_property.py -q -s
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from solvers.schedule import Schedule
from tests.solvers.bound_property import Ledger, draw, examine, is_staged
from tests.solvers.shared_engines import shared_engines

FIRST = int(os.environ.get("BOUND_FIRST", "0"))
GRAPHS = int(os.environ.get("BOUND_GRAPHS", "24"))
BLOCK = 12


@pytest.fixture(scope="module")
def ledger() -> Iterator[Ledger]:
    book = Ledger()
    with shared_engines():
        yield book
    if "BOUND_GRAPHS" in os.environ:
        sys.stderr.write(f"\n{book}\n")


@pytest.mark.parametrize("first", range(FIRST, FIRST + GRAPHS, BLOCK))
def test_no_schedule_is_below_the_bound(ledger: Ledger, first: int) -> None:
    for seed in range(first, first + BLOCK):
        examine(seed, ledger)


def test_a_program_that_an_engine_once_called_infeasible(ledger: Ledger) -> None:
    """The running sums of Checkmate's memory rows had a bound so large that HiGHS answered wrongly."""
    examine(1395, ledger)


def test_a_program_whose_optimum_a_restart_of_the_engine_lost(ledger: Ledger) -> None:
    """HiGHS restarted, presolved once more, and called a staged schedule of twice the cost optimal."""
    examine(1666, ledger)


def test_every_family_is_drawn() -> None:
    drawn = [draw(seed) for seed in range(48)]
    assert len({family for _, family, _, _ in drawn}) == 6
    assert len({features for _, _, features, _ in drawn}) == 3
    assert 20 < sum(small for _, _, _, small in drawn) < 44


def test_staged_schedules_are_told_from_others() -> None:
    graph, *_ = draw(0)
    assert is_staged(Schedule.store_all(graph))
    assert is_staged(Schedule.from_order(graph, [0, 1, 0, 2, *range(3, len(graph))]))
    assert not is_staged(Schedule.from_order(graph, [0, 1, 1, 0, 2, *range(3, len(graph))]))
