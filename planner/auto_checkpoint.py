"""``auto_checkpoint(model, budget)``: plan and rewrite at the first training step, with that step's own inputs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from planner.backend import Compiler
from planner.budget import Budget, parse_budget
from planner.decide import OnChange
from planner.keep_plan import keep_plans
from planner.plan_file import Plan
from planner.planned_call import INSIDE_ANOTHER, PlannedCall, planned_call
from planner.ranks import data_parallel_ranks, from_first_rank, refuse_wrapper
from planner.switches import refuse_checkpointing

OnPlan = Callable[[Plan], None]


def auto_checkpoint(
    model: nn.Module,
    budget: int | str | Budget,
    *,
    on_plan: OnPlan | None = None,
    on_change: OnChange = "replan",
    compiler: Compiler = "eager",
    **options: Any,
) -> nn.Module:
    """Make `model` train within `budget`; returns the same module.

    Two lines turn a training script into one that fits::

        from planner import auto_checkpoint
        model = auto_checkpoint(model, "12GiB")

    **Arguments:**

    - `on_plan`: called with the :class:`Plan` once it is made, to print or save it.
    - `on_change`: as in :func:`planner.rewrite`.
    - `compiler`, `options`: as in :func:`planner.plan`; `start` may be the plan of an earlier run.

    The budget and the options' names are read now; the model is planned at its first call in training mode with
    gradients. Until then, and at every call without gradients, it runs as it is. In a data-parallel run the first rank
    plans for all of them. Raises :class:`~planner.errors.BudgetError`, and `TypeError` for an unknown option.
    """
    parse_budget(budget)
    check_options(options)
    refuse_wrapper(model)
    refuse_checkpointing(model)
    keep_plans()
    model._compiled_call_impl = _FirstStep(model, budget, on_plan, on_change, compiler, options)  # type: ignore[assignment]
    return model


def check_options(options: Collection[str]) -> None:
    """Raise `TypeError` for what :func:`planner.plan` does not take, or is known from the first step."""
    from planner.api import plan

    known = [p for p in inspect.signature(plan).parameters.values() if p.kind is p.KEYWORD_ONLY]
    names = {parameter.name for parameter in known} - {"compiler"}
    for option in options:
        if option not in names:
            near = difflib.get_close_matches(option, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"{option!r} is no option of planning: {hint}They are {', '.join(sorted(names))}")


def waits_for_first_step(model: nn.Module) -> bool:
    """Whether :func:`auto_checkpoint` has seen no training step of `model` yet."""
    return isinstance(planned_call(model), _FirstStep)


class _FirstStep(PlannedCall):
    """Stands in for the module's call until the first training step."""

    def __init__(
        self,
        model: nn.Module,
        budget: int | str | Budget,
        on_plan: OnPlan | None,
        on_change: OnChange,
        compiler: Compiler,
        options: Any,
    ) -> None:
        self.model, self.budget, self.on_plan, self.options = model, budget, on_plan, options
        self.on_change: OnChange = on_change
        self.compiler: Compiler = compiler

    @torch.compiler.disable(reason=INSIDE_ANOTHER)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Plan, rewrite, and run the first training step; without gradients, run as it is."""
        from planner.rewrite import rewrite

        if not (torch.is_grad_enabled() and self.model.training):
            return self.model._call_impl(*args, **kwargs)
        ranks = data_parallel_ranks(self.model)
        if len(ranks) > 1:
            made = Plan.from_json(from_first_rank(ranks, lambda: self._plan(args, kwargs).to_json()))
        else:
            made = self._plan(args, kwargs)
        if self.on_plan is not None:
            self.on_plan(made)
        rewrite(self.model, made, on_change=self.on_change)
        return self.model(*args, **kwargs)

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        from planner.api import plan

        return plan(self.model, self.budget, args, kwargs, compiler=self.compiler, **self.options)
