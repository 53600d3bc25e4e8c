"""FSDP2 (`fully_shard`) around blocks that are planned one by one: two processes on this machine, joined by gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from planner import BlockPlans, RewriteError, plan, plan_blocks
from solvers.chen import ChenGreedy
from tests.planner.fsdp_scenario import scenario, without_dropout
from tests.planner.stress import RecomputeAlways
from tests.planner.two_ranks import in_two_ranks, stack, tokens

Results = list[dict[str, Any]]
NAMES = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fsdp")
    common: dict[str, Any] = {"shards": 2, "solver": RecomputeAlways()}
    plan_blocks(stack(), "1GiB", (tokens(0),), **common).save(path / "float32.json")
    half = plan_blocks(without_dropout(), "1GiB", (tokens(0),), param_dtype=torch.bfloat16, **common)
    half.save(path / "bfloat16.json")
    plan_blocks(stack(), "1GiB", (tokens(0),), shards=2, solver=ChenGreedy()).save(path / "other.json")
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return in_two_ranks(scenario, folder)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_plain_fsdp(results: Results, name: str) -> None:
    """Three steps, one accumulating, in float32 with dropout; bit for bit, on both ranks."""
    for result in results:
        plain, planned = result[name]["plain"], result[name]["planned"]
        assert all(torch.equal(a, b) for a, b in zip(plain["losses"], planned["losses"], strict=True))
        assert list(plain["gradients"]) == list(planned["gradients"])
        assert all(torch.equal(planned["gradients"][n], g) for n, g in plain["gradients"].items())
        assert min(planned["recomputed"]) > 0
        assert planned["compiled"] == [1] * 3


def test_rewritten_after_fully_shard_is_the_same(results: Results) -> None:
    for result in results:
        after, plain = result["float32"]["after"], result["float32"]["plain"]
        assert all(torch.equal(after["gradients"][n], g) for n, g in plain["gradients"].items())
        assert min(after["recomputed"]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_gathered_only_while_their_block_runs(results: Results, name: str) -> None:
    for result in results:
        plain, planned = result[name]["plain"]["gathered"], result[name]["planned"]["gathered"]
        assert planned == plain
        assert len(planned) == 3 * 2 * 3
        assert all(not any(gathered) for what, _, gathered in planned if what == "forward done")
        assert all(sum(gathered) <= 1 for _, _, gathered in planned)


@pytest.mark.parametrize("name", NAMES)
def test_the_peak_is_within_the_prediction(results: Results, folder: Path, name: str) -> None:
    predicted = BlockPlans.load(folder / f"{name}.json").predicted_peak_bytes
    sharded = sum(p.numel() * p.element_size() for p in stack().parameters()) // 2
    for result in results:
        # A later micro-batch: parameters and gradients are there from the start, both sharded.
        measured = result[name]["planned"]["peak"] + 2 * sharded + tokens(0).numel() * 8
        assert measured <= predicted
        assert result[name]["planned"]["peak"] < result[name]["plain"]["peak"]


def test_ranks_with_different_plans_all_refuse(results: Results) -> None:
    messages = [result["different plans"] for result in results]
    assert messages[0] == messages[1]
    assert messages[0].startswith("PlanMismatchError: the ranks have different plans")


def test_what_no_plan_can_hold_is_refused(results: Results) -> None:
    for result in results:
        assert "'blocks.0' inside of the planned FSDPStack is fully sharded by itself" in result["whole model"]
        assert result["sharded block"].startswith("CaptureError: tensors of type DTensor are not supported")


def test_the_first_form_of_fsdp_is_refused() -> None:
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # it cannot be made without an accelerator
    with pytest.raises(RewriteError, match=r"use fully_shard \(FSDP2\) instead"):
        plan(wrapper, "1GiB", (tokens(0),))
