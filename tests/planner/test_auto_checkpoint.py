"""Two lines in an existing training script: planned and rewritten at the first training step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from planner import BudgetError, InfeasibleBudgetError, InvalidPlanError, Plan, auto_checkpoint, plan
from solvers import Auto, ChenGreedy
from tests.models import MODELS

QUICK = Auto(time_limit_seconds=60.0, work_limit=3)


def test_the_first_training_step_plans_with_its_own_inputs() -> None:
    given = MODELS["returns_dict"]()
    plain = copy.deepcopy(given.model)
    plans: list[Plan] = []
    model = auto_checkpoint(given.model, "60%", on_plan=plans.append, solver=QUICK)
    assert model is given.model
    with torch.no_grad():
        model(*given.args, **given.kwargs)
    assert not plans
    for _ in range(3):
        for one in (plain, model):
            torch.manual_seed(2)
            one(*given.args, **given.kwargs)["loss"].backward()
    (made,) = plans
    assert made.predicted_peak_bytes <= made.budget_bytes
    assert made.overhead > 0
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_eval_runs_plainly_before_and_after() -> None:
    given = MODELS["returns_dict"]()
    plain = copy.deepcopy(given.model).eval()
    expected = plain(*given.args, **given.kwargs)["scores"]
    model = auto_checkpoint(given.model, "60%", solver=QUICK)
    model.eval()
    assert torch.equal(model(*given.args, **given.kwargs)["scores"], expected)
    model.train()
    model(*given.args, **given.kwargs)["loss"].backward()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(*given.args, **given.kwargs)["scores"], expected)


def test_the_budget_is_read_at_once_and_judged_at_the_first_step() -> None:
    given = MODELS["returns_dict"]()
    with pytest.raises(BudgetError):
        auto_checkpoint(given.model, "12")
    model = auto_checkpoint(given.model, "1%", solver=QUICK)
    with pytest.raises(InfeasibleBudgetError):
        model(*given.args, **given.kwargs)


def test_state_dict_and_class_stay() -> None:
    given = MODELS["returns_dict"]()
    keys, kind = list(given.model.state_dict()), type(given.model)
    model = auto_checkpoint(given.model, "90%", solver=QUICK)
    model(*given.args, **given.kwargs)["loss"].backward()
    assert list(model.state_dict()) == keys
    assert type(model) is kind


def test_the_first_plan_starts_from_an_earlier_one() -> None:
    given = MODELS["returns_dict"]()
    first = plan(given.model, "65%", given.args, given.kwargs, solver=ChenGreedy())
    plans: list[Plan] = []
    quick = Auto(time_limit_seconds=60.0, work_limit=1)
    model = auto_checkpoint(given.model, first.budget_bytes, on_plan=plans.append, solver=quick, start=first)
    model(*given.args, **given.kwargs)["loss"].backward()
    assert plans[0].overhead <= first.overhead


def test_a_start_of_another_step_is_refused_at_the_first_step() -> None:
    foreign = plan(torch.nn.Linear(8, 8), "200%", (torch.ones(4, 8),), loss_fn=torch.sum)
    given = MODELS["returns_dict"]()
    model = auto_checkpoint(given.model, "60%", solver=QUICK, start=foreign)
    with pytest.raises(InvalidPlanError, match=r"but a plan for torch\.nn\.modules\.linear\.Linear"):
        model(*given.args, **given.kwargs)


def test_a_misspelt_option_is_refused_at_once() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="'time_limit' is no option of planning: did you mean 'time_limit_seconds'"):
        auto_checkpoint(model, "1GiB", time_limit=3)
    with pytest.raises(TypeError, match="'example_inputs' is no option of planning"):
        auto_checkpoint(model, "1GiB", example_inputs=())
    assert model._compiled_call_impl is None
