"""Checks a plan against a model: the same graph, the same numbers, no more memory than planned.

One training step is run twice from the same parameters, buffers and random state: plainly, on a copy of the model,
and rewritten by the plan. Outputs, gradients and buffers must agree bit for bit, and the measured peak must not exceed
the budget. Further steps are watched operator by operator. The model itself is left rewritten: whoever checks a plan
has built the model for that.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from graph_capture.capture import capture
from graph_capture.formats import format_bytes
from graph_capture.graph import Compiler
from graph_capture.inputs import resolve_inputs
from planner.errors import CaptureError, PlannerError
from planner.measure import LossFn, loss_of, measure_step
from planner.rewrite import rewrite
from planner.watching import watch
from planner.world import environment_differences, model_differences, shown

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
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    loss_fn: LossFn | None = None,
) -> CheckReport:
    """Check `plan` against `model`, which is rewritten on the way.

    A plan that does not belong to the model ends the check at the fingerprint; later results would mean nothing.
    """
    model, args, kwargs = resolve_inputs(model, args, kwargs)
    results = [_check_fingerprint(plan, model, args, kwargs, loss_fn), _check_simulation(plan)]
    if results[0].passed is False:
        return CheckReport(tuple(results))
    plain_model = copy.deepcopy(model)
    plain = _run(plain_model, args, kwargs, loss_fn)
    plain_peak_bytes = _measure(plan, plain_model, args, kwargs, loss_fn)
    del plain_model
    try:
        rewritten_model = rewrite(model, plan, on_change="error")
        rewritten = _run(rewritten_model, args, kwargs, loss_fn)
    except (PlannerError, CaptureError) as error:
        return CheckReport((*results, CheckResult("rewritten step", False, str(error))))
    results += [
        _compare("outputs", plain.outputs, rewritten.outputs, plan.compiler),
        _compare("gradients", plain.gradients, rewritten.gradients, plan.compiler),
        _compare("buffers", plain.buffers, rewritten.buffers, plan.compiler),
        _check_peak(plan, plain_peak_bytes, _measure(plan, rewritten_model, args, kwargs, loss_fn)),
        _check_operators(plan, rewritten_model, args, kwargs, loss_fn),
    ]
    return CheckReport(tuple(results))


def _check_fingerprint(
    plan: Plan, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], loss_fn: LossFn | None
) -> CheckResult:
    """Capture the model again, as the plan was captured, and spell out what differs."""
    name = "fingerprint"
    found = model_differences(plan, model, args, kwargs)
    if found:
        return CheckResult(name, False, shown(found + environment_differences(plan)))
    settings = plan.settings
    try:
        captured = capture(
            model,
            args,
            kwargs,
            loss_fn=loss_fn,
            device=settings["device"],
            gradient_accumulation=settings["gradient_accumulation"],
            extra_bytes=settings["extra_bytes"],
            compiler=plan.compiler,
        )
    except CaptureError as error:
        return CheckResult(name, False, str(error))
    if captured.loss.location != plan.loss.location:
        where = f"the loss is {captured.loss.location}, in the plan it is {plan.loss.location}"
        return CheckResult(
            name, False, f"{where}; the factory must return the same loss_fn that the plan was made with"
        )
    if captured.program_fingerprint != plan.program_fingerprint:
        others = "".join(f"; {difference}" for difference in environment_differences(plan))
        what = "the model's operators are not the plan's: its code or a setting has changed"
        return CheckResult(name, False, what + others)
    if captured.graph.fingerprint != plan.fingerprint:
        return CheckResult(name, False, "the model is the plan's, but its loss or the memory around it is not")
    return CheckResult(name, True, f"captured again, the model gives the plan's graph ({plan.fingerprint})")


def _check_simulation(plan: Plan) -> CheckResult:
    # The plan was simulated when it was loaded; it would not exist if its peak were over the budget.
    peak, budget = format_bytes(plan.predicted_peak_bytes), format_bytes(plan.budget_bytes)
    return CheckResult("simulation", True, f"the schedule is legal; predicted peak {peak}, budget {budget}")


def _run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], loss_fn: LossFn | None) -> _Step:
    torch.manual_seed(SEED)
    model.zero_grad(set_to_none=True)
    output = model(*_fresh(tuple(args)), **_fresh(dict(kwargs)))
    loss_of(output, loss_fn).backward()
    plain = vars(output) if dataclasses.is_dataclass(output) and not isinstance(output, Mapping) else output
    tensors = [leaf for leaf in tree_leaves(plain) if isinstance(leaf, Tensor)]
    outputs = {f"output {number}": tensor.detach().clone() for number, tensor in enumerate(tensors)}
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    return _Step(outputs, gradients, buffers)


def _fresh(inputs: Any) -> Any:
    """Inputs of a step's own: a model may write into them."""
    return tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), inputs)


def _compare(
    what: str, plain: Mapping[str, Tensor | None], rewritten: Mapping[str, Tensor | None], compiler: Compiler
) -> CheckResult:
    """Bit for bit with eager kernels; as near as rounding lets them be where a compiler generated others."""
    if plain.keys() != rewritten.keys():
        difference = ", ".join(sorted(plain.keys() ^ rewritten.keys())[:3])
        return CheckResult(what, False, f"not the same {what}: {difference}")
    different: list[str] = []
    worst = furthest = 0.0
    for name, expected in plain.items():
        found = rewritten[name]
        if expected is None or found is None:
            if expected is not found:
                different.append(name)
                worst = math.inf
        elif compiler != "eager" and (near := _relative_distance(expected, found)) <= _ROUNDING[_is_half(expected)]:
            furthest = max(furthest, near)
        elif not _bit_equal(expected, found):
            different.append(name)
            worst = max(worst, _distance(expected, found))
    if different:
        named = ", ".join(different[:3]) + (", ..." if len(different) > 3 else "")
        return CheckResult(what, False, f"{len(different)} of {len(plain)} differ ({named}), by up to {worst:.3g}")
    if compiler != "eager":
        return CheckResult(what, True, f"within {furthest:.1g} of eager's largest, which {compiler} rounds otherwise")
    return CheckResult(what, True, f"bit for bit the same ({len(plain)})")


_ROUNDING = {False: 1e-3, True: 5e-2}
"""How far tensors may be apart, as a fraction of the largest element, in single or double precision and in half."""


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _relative_distance(expected: Tensor, found: Tensor) -> float:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    distance = _distance(expected, found)
    return distance / largest if largest else distance


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
    plan: Plan, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], loss_fn: LossFn | None
) -> int | None:
    """Measured peak of a step, the worse of the regimes that are planned for; `None` if the plan is for elsewhere."""
    if _is_elsewhere(plan, model):
        return None
    regimes = (False, True) if plan.settings["gradient_accumulation"] else (False,)
    return max(
        measure_step(model, *args, loss_fn=loss_fn, gradient_accumulation=accumulate, **kwargs).peak_bytes
        for accumulate in regimes
    )


def _is_elsewhere(plan: Plan, model: nn.Module) -> bool:
    kinds = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    return kinds != {"cpu" if plan.environment.device == "cpu" else "cuda"}


def _check_operators(
    plan: Plan, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], loss_fn: LossFn | None
) -> CheckResult:
    """Where memory and prediction part, operator by operator; on a card, whose library workspaces stay, only told."""
    name = "operators"
    if _is_elsewhere(plan, model):
        return CheckResult(name, None, f"not watched: the plan is for {plan.environment.device}")
    if plan.compiler != "eager":
        return CheckResult(name, None, f"not watched: the kernels of {plan.compiler} are no operators of the plan")
    model.zero_grad(set_to_none=True)
    with watch(model) as report:
        for _ in range(2 if plan.settings["gradient_accumulation"] else 1):
            loss_of(model(*_fresh(tuple(args)), **_fresh(dict(kwargs))), loss_fn).backward()
    model.zero_grad(set_to_none=True)
    passed = report.holds if plan.environment.device == "cpu" else None
    parting = next((p for step in report.steps for p in (step.over, step.over_budget, step.under) if p), None)
    if parting is not None:
        return CheckResult(name, passed, f"actual and predicted memory part first at {parting}")
    step = report.steps[-1]
    within = format_bytes(step.tolerance_bytes)
    return CheckResult(name, passed, f"{len(step.executions)} executions, each within {within} of the prediction")


def _check_peak(plan: Plan, plain_bytes: int | None, rewritten_bytes: int | None) -> CheckResult:
    if plain_bytes is None or rewritten_bytes is None:
        return CheckResult(
            "peak", None, f"not measured: the plan is for {plan.environment.device}, the model is elsewhere"
        )
    # Declared memory, such as optimizer state, is in the budget and not in this step.
    declared_bytes = sum(plan.settings["extra_bytes"].values())
    beside = f" beside {format_bytes(declared_bytes)} that are declared" if declared_bytes else ""
    detail = (
        f"measured {format_bytes(rewritten_bytes)}{beside}, predicted {format_bytes(plan.predicted_peak_bytes)}, "
        f"budget {format_bytes(plan.budget_bytes)}; without the plan {format_bytes(plain_bytes)}"
    )
    return CheckResult("peak", rewritten_bytes + declared_bytes <= plan.budget_bytes, detail)
