"""Checks a plan against a model: the same graph, the same numbers, no more memory than planned.

One training step is run twice from the same parameters, buffers and random state: plainly, on a copy of the model,
and rewritten by the plan. Outputs, gradients and buffers must agree bit for bit, and the measured peak must not exceed
the budget. The model itself is left rewritten: whoever checks a plan has built the model for that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map_only

from planner.api import capture_for_plan
from planner.budget import format_bytes
from planner.errors import CaptureError, PlannerError
from planner.measure import measure_step
from planner.rewrite import rewrite

if TYPE_CHECKING:
    from planner.plan_file import Plan

SEED = 20260101
"""Of the random state that both steps start from."""


@dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at; `passed` is `None` if it could not be, and `detail` says why or what was found."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class CheckReport:
    """Everything that was looked at, in order."""

    results: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; what could not be looked at does not count as a failure."""
        return all(result.passed is not False for result in self.results)

    def __str__(self) -> str:
        words = {True: "ok", False: "FAILED", None: "skipped"}
        width = max((len(result.name) for result in self.results), default=0)
        lines = [f"{words[r.passed]:<8} {r.name:<{width}}  {r.detail}" for r in self.results]
        return "\n".join([*lines, "the plan holds" if self.passed else "the plan does not hold"])


@dataclass(frozen=True)
class _Step:
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def check_plan(
    plan: Plan,
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
) -> CheckReport:
    """Check `plan` against `model`, which is rewritten on the way.

    A plan that does not belong to the model ends the check at the fingerprint; later results would mean nothing.
    """
    kwargs = dict(kwargs or {})
    results = [_check_fingerprint(plan, model, args, kwargs, loss_fn), _check_simulation(plan)]
    if results[0].passed is False:
        return CheckReport(tuple(results))
    model.train(plan.training)
    plain_model = copy.deepcopy(model)
    plain = _run(plain_model, args, kwargs, loss_fn)
    plain_peak_bytes = _measure(plan, plain_model, args, kwargs, loss_fn)
    del plain_model
    try:
        rewritten_model = rewrite(model, plan)
        rewritten = _run(rewritten_model, args, kwargs, loss_fn)
    except PlannerError as error:
        return CheckReport((*results, CheckResult("rewritten step", False, str(error))))
    results += [
        _compare("outputs", plain.outputs, rewritten.outputs),
        _compare("gradients", plain.gradients, rewritten.gradients),
        _compare("buffers", plain.buffers, rewritten.buffers),
        _check_peak(plan, plain_peak_bytes, _measure(plan, rewritten_model, args, kwargs, loss_fn)),
    ]
    return CheckReport(tuple(results))


def training_loss(output: Any, loss_fn: Callable[..., Tensor] | None) -> Tensor:
    """The scalar that a check calls `backward` on.

    `loss_fn` of the output if there is one; else the model's own loss (the output itself, its `loss`, or the first of
    its tensors, where that is a scalar). Where the loss is outside of the model, the sum of all its floating outputs
    stands in for it: a check compares numbers, and any loss will do.
    """
    if loss_fn is not None:
        return loss_fn(output)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    for candidate in (own, *leaves[:1]):
        if isinstance(candidate, Tensor) and candidate.numel() == 1 and candidate.requires_grad:
            return candidate.reshape(())
    parts = [leaf.float().sum() for leaf in leaves if leaf.requires_grad]
    if not parts:
        raise PlannerError("no output of the model requires a gradient, so there is no training step to check")
    return torch.stack(parts).sum()


def _check_fingerprint(
    plan: Plan,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss_fn: Callable[..., Tensor] | None,
) -> CheckResult:
    name = "fingerprint"
    try:
        captured = capture_for_plan(model, args, kwargs, plan, loss_fn=loss_fn)
    except (PlannerError, CaptureError) as error:
        return CheckResult(name, False, str(error))
    if captured.fingerprint != plan.fingerprint:
        return CheckResult(name, False, f"the model's graph is {captured.fingerprint}, the plan's {plan.fingerprint}")
    return CheckResult(name, True, f"the model captured again gives the plan's graph, {plan.fingerprint}")


def _check_simulation(plan: Plan) -> CheckResult:
    # The plan was simulated when it was loaded; it would not exist if its peak were over the budget.
    peak, budget = format_bytes(plan.predicted_peak_bytes), format_bytes(plan.budget_bytes)
    return CheckResult("simulation", True, f"the schedule is legal; predicted peak {peak}, budget {budget}")


def _run(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], loss_fn: Callable[..., Tensor] | None
) -> _Step:
    torch.manual_seed(SEED)
    model.zero_grad(set_to_none=True)
    output = model(*_fresh(tuple(args)), **_fresh(dict(kwargs)))
    training_loss(output, loss_fn).backward()
    outputs = {
        "".join(str(key) for key in path) or "output": leaf.detach().clone()
        for path, leaf in tree_flatten_with_path(output)[0]
        if isinstance(leaf, Tensor)
    }
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    return _Step(outputs, gradients, buffers)


def _fresh(inputs: Any) -> Any:
    """Inputs of a step's own: a model may write into them."""
    return tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), inputs)


def _compare(what: str, plain: Mapping[str, Tensor | None], rewritten: Mapping[str, Tensor | None]) -> CheckResult:
    if plain.keys() != rewritten.keys():
        difference = ", ".join(sorted(plain.keys() ^ rewritten.keys())[:3])
        return CheckResult(what, False, f"not the same {what}: {difference}")
    different: list[str] = []
    worst = 0.0
    for name, expected in plain.items():
        found = rewritten[name]
        if expected is None or found is None:
            if expected is not found:
                different.append(name)
                worst = math.inf
        elif not _bit_equal(expected, found):
            different.append(name)
            worst = max(worst, _distance(expected, found))
    if different:
        named = ", ".join(different[:3]) + (", ..." if len(different) > 3 else "")
        return CheckResult(what, False, f"{len(different)} of {len(plain)} differ ({named}), by up to {worst:.3g}")
    return CheckResult(what, True, f"{len(plain)} tensors, bit for bit the same")


def _bit_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: NaN equals NaN, and zero does not equal minus zero."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    distance = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return math.inf if math.isnan(distance) else distance


def _measure(
    plan: Plan,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss_fn: Callable[..., Tensor] | None,
) -> int | None:
    """Peak bytes of one step on the machine at hand; `None` if the plan is for another device."""
    if not _on_planned_device(plan, model):
        return None
    return measure_step(model, *args, loss_fn=loss_fn, **kwargs).peak_bytes


def _on_planned_device(plan: Plan, model: nn.Module) -> bool:
    kinds = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    return kinds <= {"cpu"} if plan.environment.device == "cpu" else kinds <= {"cuda"}


def _check_peak(plan: Plan, plain_bytes: int | None, rewritten_bytes: int | None) -> CheckResult:
    if plain_bytes is None or rewritten_bytes is None:
        return CheckResult("peak", None, f"the plan is for {plan.environment.device}, the model is elsewhere")
    detail = (
        f"measured {format_bytes(rewritten_bytes)}, predicted {format_bytes(plan.predicted_peak_bytes)}, "
        f"budget {format_bytes(plan.budget_bytes)}; without the plan {format_bytes(plain_bytes)}"
    )
    return CheckResult("peak", rewritten_bytes <= plan.budget_bytes, detail)
