"""`plan`, `rewrite` and plans as files: what a user calls."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from planner import (
    BudgetError,
    InfeasibleBudgetError,
    Plan,
    PlanChangedWarning,
    PlanMismatchError,
    plan,
    rewrite,
)
from planner.rewrite import restore
from solvers import Auto, ChenGreedy, StoreAll
from tests.models import MODELS, Case

QUICK = Auto(time_limit_seconds=60.0, work_limit=3)
ROOT = Path(__file__).resolve().parents[2]


def case(name: str = "returns_dict") -> Case:
    """One of the small models."""
    return MODELS[name]()


def gradients(model: torch.nn.Module, given: Case) -> list[torch.Tensor]:
    """Gradients of one seeded step of a model that returns its loss."""
    model.zero_grad()
    torch.manual_seed(5)
    model(*given.args, **given.kwargs)["loss"].backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_plan_keeps_its_budget_and_carries_its_figures() -> None:
    given = case()
    made = plan(given.model, "60%", given.args, given.kwargs, solver=QUICK)
    assert made.predicted_peak_bytes <= made.budget_bytes == int(0.6 * made.eager_peak_bytes)
    assert 0 <= made.lower_bound <= made.overhead
    assert made.gap == pytest.approx(made.overhead - made.lower_bound)
    assert made.status in ("OPTIMAL", "FEASIBLE")
    assert made.solver == "auto"
    assert made.later_peak_bytes > made.first_peak_bytes
    text = str(made)
    assert all(word in text for word in ("budget", "lower bound", "gap", "predicted peak", "later micro-batch"))


def test_without_accumulation_more_is_left_for_activations() -> None:
    given = case()
    strict = plan(given.model, 500_000, given.args, given.kwargs, solver=QUICK)
    loose = plan(given.model, 500_000, given.args, given.kwargs, solver=QUICK, gradient_accumulation=False)
    assert loose.overhead <= strict.overhead
    assert loose.first_peak_bytes <= 500_000 < loose.later_peak_bytes


def test_declared_memory_is_part_of_the_budget() -> None:
    given = case()
    extra = {"optimizer state": 40_000, "headroom": 10_000}
    plain = plan(given.model, "200%", given.args, given.kwargs)
    made = plan(given.model, "200%", given.args, given.kwargs, extra_bytes=extra)
    assert made.predicted_peak_bytes == plain.predicted_peak_bytes + 50_000
    assert {"optimizer state", "headroom"} <= {label for label, _ in made.budget.covers}


def test_a_budget_above_store_all_recomputes_nothing_and_says_so() -> None:
    given = case()
    made = plan(given.model, "10GiB", given.args, given.kwargs)
    assert made.overhead == made.gap == 0
    assert made.status == "OPTIMAL"
    assert any("store-all" in note for note in made.notes)


@pytest.mark.parametrize("budget", ["0.6", "12", -1, 0, "-5GiB", "nan%", "0%", True, 0.5, "12 potatoes"])
def test_a_budget_that_cannot_be_read_is_refused_at_once(budget: object) -> None:
    with pytest.raises(BudgetError):
        plan(torch.nn.Linear(2, 2), budget, (torch.randn(1, 2),))  # type: ignore[arg-type]


def test_an_impossible_budget_names_the_smallest_that_works() -> None:
    given = case()
    with pytest.raises(InfeasibleBudgetError, match="smallest budget known to work") as caught:
        plan(given.model, "5%", given.args, given.kwargs, solver=QUICK)
    smallest = caught.value.smallest_known_budget_bytes
    assert smallest is not None
    assert caught.value.floor_operator is not None
    made = plan(given.model, smallest, given.args, given.kwargs, solver=QUICK)
    assert made.predicted_peak_bytes <= smallest


@pytest.mark.parametrize("solver", [StoreAll(), ChenGreedy()], ids=lambda s: s.name)
def test_a_solver_may_be_given(solver: Auto) -> None:
    given = case()
    made = plan(given.model, "90%", given.args, given.kwargs, solver=solver)
    assert made.solver == solver.name


def test_the_time_limit_replaces_the_solvers() -> None:
    given = case()
    made = plan(given.model, "90%", given.args, given.kwargs, time_limit_seconds=2)
    assert made.settings["solver"]["options"]["time_limit_seconds"] == 2.0


def test_a_plan_for_another_model_is_refused_with_the_difference() -> None:
    given = case()
    made = plan(given.model, "200%", given.args, given.kwargs)
    other = copy.deepcopy(given.model)
    other.head = torch.nn.Linear(32, 11)
    with pytest.raises(PlanMismatchError, match=r"head\.weight.*shape"):
        rewrite(other, made)
    with pytest.raises(PlanMismatchError, match="Linear"):
        rewrite(torch.nn.Linear(3, 3), made)
    frozen = copy.deepcopy(given.model)
    frozen.head.weight.requires_grad_(False)
    with pytest.raises(PlanMismatchError, match="requires_grad"):
        rewrite(frozen, made)


def test_another_shape_keeps_the_decisions_as_long_as_they_fit() -> None:
    given = case("names_input")
    made = plan(given.model, "75%", (), given.kwargs, loss_fn=given.loss_fn, solver=QUICK)
    plain = copy.deepcopy(given.model)
    planned = rewrite(copy.deepcopy(given.model), made, on_change="error")
    small = {"input": given.kwargs["input"][:64]}
    for model in (plain, planned):
        torch.manual_seed(3)
        model(**small).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), planned.parameters(), strict=True))
    assert planned._compiled_call_impl.backend.records[-1].recomputed > 0


def test_what_does_not_fit_is_planned_again_with_a_warning_or_refused() -> None:
    given = case("names_input")
    made = plan(given.model, "90%", (), given.kwargs, loss_fn=given.loss_fn, solver=QUICK)
    large = {"input": torch.cat([given.kwargs["input"]] * 2)[:300]}
    strict = rewrite(copy.deepcopy(given.model), made, on_change="error")
    with pytest.raises(PlanMismatchError, match="at larger shapes needs"):
        strict(**large)
    loose = rewrite(copy.deepcopy(given.model), made)
    with pytest.warns(PlanChangedWarning, match="planned again") as caught:
        loose(**large).sum().backward()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loose(**large).sum().backward()


def test_restore_takes_the_plan_away() -> None:
    given = case()
    made = plan(given.model, "60%", given.args, given.kwargs, solver=QUICK)
    model = rewrite(given.model, made)
    assert model is given.model
    assert model._compiled_call_impl is not None
    assert restore(model)._compiled_call_impl is None


SCRIPT = """
import sys, torch
from planner import Plan, rewrite
from tests.models import MODELS
from tests.planner.test_plan_api import gradients
given = MODELS["returns_dict"]()
plain = gradients(MODELS["returns_dict"]().model, given)
model = rewrite(given.model, Plan.load(sys.argv[1]), on_change="error")
planned = gradients(model, given)
assert all(torch.equal(a, b) for a, b in zip(plain, planned, strict=True))
assert model._compiled_call_impl.backend.records[-1].recomputed > 0
"""


def test_a_saved_plan_works_in_another_process(tmp_path: Path) -> None:
    given = case()
    made = plan(given.model, "60%", given.args, given.kwargs, solver=QUICK)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "plan.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
