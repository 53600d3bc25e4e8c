"""``auto_checkpoint(model, budget)``: plan and rewrite at the first training step, with that step's own inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from planner.budget import Budget, parse_budget
from planner.decide import OnChange
from planner.plan_file import Plan

OnPlan = Callable[[Plan], None]


def auto_checkpoint(
    model: nn.Module,
    budget: int | str | Budget,
    *,
    on_plan: OnPlan | None = None,
    on_change: OnChange = "replan",
    **options: Any,
) -> nn.Module:
    """Make `model` train within `budget`; returns the same module.

    Two lines turn a training script into one that fits::

        from planner import auto_checkpoint
        model = auto_checkpoint(model, "12GiB")

    **Arguments:**

    - `on_plan`: called with the :class:`Plan` once it is made, to print or save it.
    - `on_change`: as in :func:`planner.rewrite`. `options`: as in :func:`planner.plan`.

    The budget is read now; the model is planned at its first call in training mode with gradients. Until then, and at
    every call without gradients, it runs as it is.
    """
    parse_budget(budget)
    model._compiled_call_impl = _FirstStep(model, budget, on_plan, on_change, options)  # type: ignore[assignment]
    return model


class _FirstStep:
    """Stands in for the module's call until the first training step."""

    def __init__(
        self, model: nn.Module, budget: int | str | Budget, on_plan: OnPlan | None, on_change: OnChange, options: Any
    ) -> None:
        self.model, self.budget, self.on_plan, self.options = model, budget, on_plan, options
        self.on_change: OnChange = on_change

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from planner.api import plan
        from planner.rewrite import rewrite

        if not (torch.is_grad_enabled() and self.model.training):
            return self.model._call_impl(*args, **kwargs)
        made = plan(self.model, self.budget, args, kwargs, **self.options)
        if self.on_plan is not None:
            self.on_plan(made)
        rewrite(self.model, made, on_change=self.on_change)
        return self.model(*args, **kwargs)
