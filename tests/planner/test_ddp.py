"""DistributedDataParallel around a planned model: two processes on this machine, joined by gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from planner import plan
from solvers.chen import ChenGreedy
from tests.planner.ddp_scenario import scenario
from tests.planner.two_ranks import in_two_ranks, stack, tokens

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("ddp")
    made = plan(stack(), "80%", (tokens(0),), solver=ChenGreedy())
    assert made.overhead > 0.1
    made.save(folder / "plan.json")
    plan(stack(), "95%", (tokens(0),), solver=ChenGreedy()).save(folder / "other.json")
    return in_two_ranks(scenario, folder)


@pytest.mark.parametrize("how", ["planned", "compiled"])
def test_gradients_are_those_of_plain_ddp(results: Results, how: str) -> None:
    """Three steps, the second of two micro-batches under `no_sync`, with dropout; bit for bit, on both ranks."""
    for result in results:
        for expected, given in zip(result["plain"]["gradients"], result[how]["gradients"], strict=True):
            assert list(given) == list(expected)
            assert all(torch.equal(given[name], gradient) for name, gradient in expected.items())
    last = [result[how]["gradients"][-1] for result in results]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


@pytest.mark.parametrize("how", ["planned", "compiled"])
def test_buckets_leave_during_the_backward_in_eager_order(results: Results, how: str) -> None:
    for result in results:
        plain, planned = result["plain"], result[how]
        assert [shapes for _, shapes in planned["buckets"]] == [shapes for _, shapes in plain["buckets"]]
        assert len(planned["buckets"]) >= 4
        left = [count / planned["operators"] for count, _ in planned["buckets"]]
        eager = [count / plain["operators"] for count, _ in plain["buckets"]]
        # Recomputation adds operators between buckets; the shares of the backward stay what they are in eager.
        assert left == sorted(left)
        assert all(abs(mine - theirs) < 0.15 for mine, theirs in zip(left, eager, strict=True)), (left, eager)


@pytest.mark.parametrize("how", ["different plans", "different compiled plans"])
def test_ranks_with_different_plans_all_refuse(results: Results, how: str) -> None:
    messages = [result[how] for result in results]
    assert messages[0] == messages[1]
    assert messages[0].startswith("PlanMismatchError: the ranks have different plans: ")
    assert "(rank 0: <Plan for " in messages[0]
    assert "(rank 1: <Plan for " in messages[0]


def test_a_rank_without_a_plan_is_no_hang(results: Results) -> None:
    message = results[0]["missing rank"]
    assert message.startswith("RewriteError: after 1 s, not all of the ranks 0, 1 run a planned model")


def test_the_first_rank_plans_for_all(results: Results) -> None:
    plans = [result["automatic"]["plans"] for result in results]
    assert len(plans[0]) == 1
    assert plans[0] == plans[1]
    assert all(result["automatic"]["equal"] for result in results)
    assert "no schedule fits the budget" in results[0]["automatic, infeasible"]
    assert results[0]["automatic, infeasible"].startswith("InfeasibleBudgetError")
    assert "rank 0, which plans for every rank, has no plan: Infeasible" in results[1]["automatic, infeasible"]


def test_the_wrapper_itself_is_refused(results: Results) -> None:
    assert "plan the module inside of it" in results[0]["wrapper"]
