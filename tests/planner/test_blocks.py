"""`plan_blocks`: one plan for all equal blocks, within a budget of the whole step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from planner import (
    BlockPlans,
    NoScheduleError,
    PinError,
    PlanFileError,
    PlanMismatchError,
    UnsupportedModelError,
    measure_step,
    plan,
    plan_blocks,
    rewrite,
)
from planner.pins import Pins
from planner.report.lifetimes import alive_after_forward
from solvers.auto import Auto
from solvers.store_all import StoreAll
from tests.planner.two_ranks import Block, Stack, stack, tokens

QUICK = Auto(time_limit_seconds=60.0, work_limit=2)


@pytest.fixture(scope="module")
def plans() -> BlockPlans:
    return plan_blocks(stack(), "85%", (tokens(0),), solver=QUICK)


def test_a_step_of_the_whole_model_is_within_the_budget(plans: BlockPlans) -> None:
    plain, model = stack(), stack()
    assert list(plans.plan_of_block) == ["blocks.0", "blocks.1", "blocks.2"]
    assert len(plans.plans) == 1
    assert 0 < plans.kept_fraction < 1
    assert plans.overhead > 0
    assert plans.predicted_peak_bytes <= plans.budget_bytes
    plans.rewrite(model, on_change="error")
    gradients = []
    for one in (plain, model):
        torch.manual_seed(0)
        one(tokens(0)).backward()
        gradients.append([p.grad.clone() for p in one.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    measured = measure_step(model, tokens(0)).peak_bytes
    assert 0.95 * plans.predicted_peak_bytes <= measured <= plans.predicted_peak_bytes
    assert measured < measure_step(plain, tokens(0)).peak_bytes


def test_a_budget_for_everything_recomputes_nothing() -> None:
    plans = plan_blocks(stack(), "100%", (tokens(0),), solver=StoreAll())
    assert plans.kept_fraction == 1.0
    assert plans.overhead == 0.0


def test_blocks_that_differ_have_plans_of_their_own() -> None:
    model = stack()
    model.blocks[1].drop.p = 0.3
    model.blocks[2].up.bias.requires_grad_(False)
    plans = plan_blocks(model, "1GiB", (tokens(0),), solver=StoreAll())
    assert len(plans.plans) >= 2
    assert plans.plan_of_block["blocks.2"] != plans.plan_of_block["blocks.0"]
    plans.rewrite(model, on_change="error")
    model(tokens(0)).backward()


def test_sharding_divides_what_stays() -> None:
    whole = plan_blocks(stack(), "1GiB", (tokens(0),), solver=StoreAll())
    sharded = plan_blocks(stack(), "1GiB", (tokens(0),), solver=StoreAll(), shards=64)
    lines = dict(sharded.covers)
    assert lines["parameters"] < dict(whole.covers)["parameters"] / 16
    assert lines["FSDP: gathered parameters"] > 0
    assert "FSDP" in str(sharded)


def test_saved_and_loaded(plans: BlockPlans, tmp_path: Path) -> None:
    plans.save(tmp_path / "blocks.json")
    assert BlockPlans.load(tmp_path / "blocks.json") == plans
    (tmp_path / "blocks.json").write_text("{}")
    with pytest.raises(PlanFileError, match="no file of block plans"):
        BlockPlans.load(tmp_path / "blocks.json")


def test_a_result_that_was_made_in_place_is_no_view() -> None:
    """The last addition runs in the place of a viewed matrix product; in eager its result is a tensor of its own."""
    block = Block(32)
    block.drop = nn.Identity()  # type: ignore[assignment]
    x = torch.randn(4, 16, 32, requires_grad=True)
    expected = block(x)
    rewrite(block, plan(block, "1GiB", (x,), solver=StoreAll()))
    given = block(x)
    assert torch.equal(given, expected)
    assert not expected._is_view()
    assert not given._is_view()
    # A write to it is seen by autograd as in eager.
    given.mul_(2)
    expected.mul_(2)
    (given_gradient,), (gradient,) = (torch.autograd.grad(y.sum(), x) for y in (given, expected))
    assert torch.equal(given_gradient, gradient)


def test_pins_name_modules_inside_of_the_blocks() -> None:
    plans = plan_blocks(stack(), "1GiB", (tokens(0),), solver=QUICK, keep="drop", recompute=["*"])
    free = plan_blocks(stack(), "1GiB", (tokens(0),), solver=StoreAll())
    (made,) = plans.plans
    assert made.pins == Pins(keep=("drop",), recompute=("*",))
    graph, schedule = made.to_graph(), made.to_schedule()
    assert graph.released
    assert alive_after_forward(graph, schedule).isdisjoint(graph.released)
    runs = Counter(schedule.order)
    assert [runs[i] for i, o in enumerate(graph.operators) if o.module == "drop" and o.phase == "forward"] == [1]
    assert plans.overhead > 0
    assert plans.kept_fraction < free.kept_fraction == 1.0
    assert plans.predicted_peak_bytes < free.predicted_peak_bytes
    plain, model = stack(), stack()
    plans.rewrite(model, on_change="error")
    for one in (plain, model):
        torch.manual_seed(0)
        one(tokens(0)).backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
    assert measure_step(model, tokens(0)).peak_bytes <= plans.predicted_peak_bytes


def test_a_pin_counts_where_blocks_have_such_a_module() -> None:
    model = stack()
    model.blocks[1] = _Wide(32)
    plans = plan_blocks(model, "1GiB", (tokens(0),), blocks=["blocks.0", "blocks.1"], solver=QUICK, keep="out")
    assert [plans.plan(f"blocks.{i}").pins.keep for i in range(2)] == [(), ("out",)]
    with pytest.raises(PinError, match=r"keep='blocks\.\*\.up' matches no module inside of a block .*near it: up"):
        plan_blocks(stack(), "1GiB", (tokens(0),), keep="blocks.*.up")
    with pytest.raises(NoScheduleError, match=r"pinned by keep= and recompute= count"):
        plan_blocks(stack(), "85%", (tokens(0),), solver=QUICK, keep="*")


def test_pins_that_need_more_than_the_block_without_recomputation() -> None:
    """The forward's peak is a wide intermediate; a second one comes on top of the gradient of the result."""
    model = stack()
    model.blocks[0] = _Wide(32)
    plans = plan_blocks(model, "1GiB", (tokens(0),), blocks=["blocks.0"], solver=QUICK, recompute="*")
    (made,) = plans.plans
    assert made.predicted_peak_bytes > made.eager_peak_bytes
    assert made.overhead > 0
    plans.rewrite(model, on_change="error")
    assert measure_step(model, tokens(0)).peak_bytes <= plans.predicted_peak_bytes


class _Wide(nn.Module):
    """Repeats its input sixteen times on the way; nothing of that is needed by the backward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.stack([x] * 16).sum(0).tanh())


def test_what_cannot_be_planned(plans: BlockPlans) -> None:
    with pytest.raises(NoScheduleError, match="smallest peak that was found"):
        plan_blocks(stack(), "20%", (tokens(0),), solver=StoreAll())
    with pytest.raises(UnsupportedModelError, match="of equal blocks: name them"):
        plan_blocks(nn.Linear(4, 4), "1GiB", (torch.randn(2, 4),), loss_fn=torch.sum)
    with pytest.raises(UnsupportedModelError, match="does not run exactly once"):
        plan_blocks(_Twice(), "1GiB", (torch.randn(2, 4, 8),), loss_fn=torch.sum)
    with pytest.raises(PlanMismatchError, match="it has no block 'blocks"):
        plans.rewrite(Stack(blocks=2))


class _Twice(nn.Module):
    """Runs its second block twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[1](self.blocks[0](x)))
