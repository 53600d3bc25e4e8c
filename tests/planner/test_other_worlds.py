"""A plan that meets another world than the one that it was made in: one error, with the difference spelled out."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from planner import Plan, PlanMismatchError, plan, rewrite
from planner.checking import check_plan
from solvers.chen import ChenGreedy


class Small(nn.Module):
    """Two layers; `twice` and `gate` stand for flags and code that change."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)
        self.twice = False

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.dropout(torch.relu(self.first(x)))
        x = torch.tanh(self.second(x)) if not self.twice else self.second(self.second(x))
        return (x if mask is None else x * mask.exp()).square().mean()


def inputs(rows: int = 8) -> torch.Tensor:
    return torch.linspace(-1, 1, rows * 16).reshape(rows, 16)


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan(Small(), "100%", (inputs(),), solver=ChenGreedy())


def refusal(made: Plan, model: nn.Module, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(PlanMismatchError) as caught:
        rewrite(model, made, on_change="error")(*args, **kwargs)
    return str(caught.value)


def freeze(model: Small) -> None:
    model.second.weight.requires_grad_(False)


CHANGED_MODELS: dict[str, tuple[Callable[[Small], Any], str]] = {
    "dtype": (lambda m: m.bfloat16(), "parameter 'first.bias' has dtype bfloat16, the plan has float32"),
    "frozen": (freeze, "parameter 'second.weight' has requires_grad False, the plan has True"),
    "missing": (lambda m: delattr(m, "second"), "parameter 'second.bias' of the plan is missing in the model"),
    "shape": (
        lambda m: setattr(m, "second", nn.Linear(16, 8)),
        r"parameter 'second.bias' has shape \(8,\), the plan has \(16,\)",
    ),
}


@pytest.mark.parametrize("change", CHANGED_MODELS)
def test_another_model_is_refused_at_once(made: Plan, change: str) -> None:
    act, words = CHANGED_MODELS[change]
    model = Small()
    act(model)
    with pytest.raises(PlanMismatchError, match=words):
        rewrite(model, made)


def test_another_shape_over_the_budget(made: Plan) -> None:
    text = refusal(made, Small(), inputs(64))
    assert "the same graph at larger shapes needs" in text
    assert "input args[0] is float32[64, 16], the plan has float32[8, 16]" in text
    assert text.count("Plan again with these inputs") == 1


def test_another_dtype_of_the_input(made: Plan) -> None:
    class Casts(Small):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x.float(), mask)

    own = plan(Casts(), "100%", (inputs(),), solver=ChenGreedy())
    text = refusal(own, Casts(), inputs().double())
    assert "input args[0] is float64[8, 16], the plan has float32[8, 16]" in text


def test_another_argument(made: Plan) -> None:
    text = refusal(made, Small(), inputs(), mask=torch.tensor(2.0))
    assert "input kwargs['mask'] (float32[]) is not in the plan" in text


def test_another_mode(made: Plan) -> None:
    text = refusal(made, Small().eval(), inputs())
    assert "the model is in evaluation mode, the plan was made in training mode" in text


def test_changed_code_names_the_module_and_the_line(made: Plan) -> None:
    model = Small()
    model.twice = True
    text = refusal(made, model, inputs())
    where = r"at second \(\S*test_other_worlds.py:\d+\) the model runs aten.addmm.default, the plan aten.tanh.default"
    assert re.search(where, text)
    assert "What differs from the plan" not in text  # nothing but the code


def test_autocast_is_named(made: Plan) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        text = refusal(made, Small(), inputs())
    assert "autocast is on (torch.bfloat16), which a plan does not record" in text


def test_another_torch_is_named_where_it_matters(made: Plan) -> None:
    environment = made.environment.model_copy(update={"torch": "2.11.0"})
    older = made.model_copy(update={"environment": environment.model_dump()})
    model, plain = Small(), Small()
    plain.load_state_dict(model.state_dict())
    rewrite(model, older, on_change="error")  # the graph decides: the same one is welcome, whoever captured it
    for each in (model, plain):
        torch.manual_seed(0)
        each(inputs()).backward()
    assert torch.equal(model.first.weight.grad, plain.first.weight.grad)  # type: ignore[arg-type]
    text = refusal(older, Small(), inputs(64))
    assert f"this is torch {torch.__version__}, the plan was made with torch 2.11.0" in text


def test_another_device_is_named() -> None:
    for_card = plan(Small(), "100%", (inputs(),), solver=ChenGreedy(), device="h100-80gb")
    text = refusal(for_card, Small(), inputs(), mask=torch.tensor(2.0))
    assert "the model is on cpu, the plan is for h100-80gb" in text


def test_check_spells_the_world_out(made: Plan) -> None:
    environment = made.environment.model_copy(update={"torch": "2.11.0"})
    older = made.model_copy(update={"environment": environment.model_dump()})
    report = check_plan(older, Small(), (inputs(4),))
    assert not report.passed
    assert "input args[0] is float32[4, 16], the plan has float32[8, 16]" in report.results[0].detail
    assert "the plan was made with torch 2.11.0" in report.results[0].detail
    model = Small()
    model.twice = True
    assert "its code or a setting has changed; this is torch" in check_plan(older, model, (inputs(),)).results[0].detail


def test_a_fresh_plan_says_what_differs(made: Plan) -> None:
    model = rewrite(copy.deepcopy(Small()), made)
    with pytest.warns(UserWarning, match=r"input kwargs\['mask'\] \(float32\[\]\) is not in the plan"):
        model(inputs(), mask=torch.tensor(2.0)).backward()
