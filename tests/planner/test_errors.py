"""The tree of errors is the one that is drawn, errors survive a process boundary, and say what they must."""

from __future__ import annotations

import math
import pickle

import pytest

from planner import errors
from planner.errors import InfeasibleBudgetError, NoScheduleError, PlannerError, error_for_solution
from solvers.solution import SearchClass, Solution, Status
from tests.planner.plans import chain


def solution(status: Status, **changes: object) -> Solution:
    fields = {
        "solver": "snapshot",
        "status": status,
        "schedule": None,
        "overhead": math.inf,
        "lower_bound": math.inf,
        "predicted_peak_bytes": 0,
        "search_class": SearchClass.ORDERED,
        "bound_scope": "every ordered schedule",
        "seconds": 0.1,
        "message": "position 7 needs 350 bytes",
        "smallest_known_budget_bytes": 2**20,
        "floor_operator": 7,
    }
    return Solution(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_tree_is_the_one_that_is_drawn() -> None:
    """Every class stands in the docstring, below its base and indented further."""
    depth_of: dict[str, int] = {}
    parents: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.strip("│├└─ ").split(" ")[0]
        kind = getattr(errors, name, None) if name else None
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            continue
        depth = len(line) - len(line.lstrip(" │├└─"))
        while parents and parents[-1][0] >= depth:
            parents.pop()
        if parents:
            assert issubclass(kind, getattr(errors, parents[-1][1])), f"{name} is drawn below {parents[-1][1]}"
        parents.append((depth, name))
        depth_of[name] = depth
    drawn = set(depth_of)
    assert drawn == {n for n in errors.__all__ if isinstance(getattr(errors, n), type)}


def test_infeasible_has_proof_smallest_budget_and_floor() -> None:
    error = error_for_solution(solution(Status.INFEASIBLE), chain(), 300, 2**21)
    assert isinstance(error, InfeasibleBudgetError)
    text = str(error)
    for part in (
        "no schedule fits the budget of 300 bytes",
        "proof (snapshot): position 7 needs 350 bytes",
        "the proof covers: every ordered schedule",
        "the smallest budget known to work: 1.00 MiB (1,048,576 bytes), 50.0 % of eager's peak",
        "operator b4 of layers.4",
        "raise the budget",
    ):
        assert part in text
    assert error.smallest_known_budget_bytes == 2**20
    assert error.floor_operator == "b4"
    assert error.solution is not None
    assert "\n" not in text


@pytest.mark.parametrize("status", [Status.UNKNOWN, Status.NOT_APPLICABLE])
def test_nothing_found_is_no_proof(status: Status) -> None:
    error = error_for_solution(solution(status, smallest_known_budget_bytes=None, floor_operator=None), chain(), 300)
    assert type(error) is NoScheduleError
    assert "proof" not in str(error)
    assert "another solver" in str(error)
    assert error.smallest_known_budget_bytes is None


def test_the_text_of_the_status_stands_in_for_a_missing_message() -> None:
    error = error_for_solution(solution(Status.UNKNOWN, message=""), chain(), 300)
    assert Status.UNKNOWN.value in str(error)


def test_errors_cross_process_boundaries() -> None:
    error = error_for_solution(solution(Status.INFEASIBLE), chain(), 300)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is InfeasibleBudgetError
    assert str(again) == str(error)
    assert again.smallest_known_budget_bytes == 2**20
    assert isinstance(again, PlannerError)
