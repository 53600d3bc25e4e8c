"""What the callbacks of all trainers share: give a model its plan when training starts, and take it away at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from planner.auto_checkpoint import OnPlan, auto_checkpoint, check_options, waits_for_first_step
from planner.backend import Compiler
from planner.budget import Budget, parse_budget
from planner.decide import OnChange
from planner.errors import RewriteError
from planner.optimizer_state import LABEL, optimizer_state_bytes
from planner.plan_file import Plan
from planner.rewrite import restore, rewrite


class TrainerSession:
    """One model's plan, from the start of a trainer's run to its end.

    **Fields:**

    - `plan`: once there is one. A second run takes the same.
    """

    def __init__(
        self,
        budget: int | str | Budget | None,
        plan: Plan | str | os.PathLike[str] | None,
        on_plan: OnPlan | None,
        on_change: OnChange,
        compiler: Compiler | None,
        options: dict[str, Any],
    ) -> None:
        if (budget is None) == (plan is None):
            raise ValueError("a callback takes a budget, as CheckpointPlannerCallback('12GiB'), or plan=..., not both")
        if plan is not None and options:
            raise ValueError(f"{sorted(options)} are for making a plan, and plan=... is made already: leave them out")
        if budget is not None:
            parse_budget(budget)
            check_options(options)
        self.budget, self.on_plan, self.options = budget, on_plan, options
        self.on_change: OnChange = on_change
        self.compiler: Compiler | None = compiler
        self.plan = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
        self.model: nn.Module | None = None

    def start(
        self, model: nn.Module, optimizers: list[Any], defaults: Mapping[str, Any], extra: Mapping[str, int]
    ) -> None:
        """Let `model` run its plan, or make one at its first training step.

        **Arguments:**

        - `optimizers`: whose state is a line of the budget, unless the user said how large it is.
        - `defaults`: options of :func:`planner.plan` that the user may overrule. `extra`: further lines of the budget.
        """
        self.model = model
        if self.plan is not None:
            rewrite(model, self.plan, on_change=self.on_change, compiler=self.compiler)
            return
        assert self.budget is not None
        options = {**defaults, **self.options}
        lines = {**extra, **(options.pop("extra_bytes", None) or {})}
        if LABEL not in lines:
            lines[LABEL] = sum(map(optimizer_state_bytes, optimizers))
        auto_checkpoint(
            model,
            self.budget,
            on_plan=self._made,
            on_change=self.on_change,
            compiler=self.compiler or "eager",
            extra_bytes={label: size for label, size in lines.items() if size},
            **options,
        )

    def check_used(self, how: str) -> None:
        """After a training step: raise if it has not called the model. `how`: what to do then."""
        if self.model is not None and waits_for_first_step(self.model):
            raise RewriteError(
                f"a training step has passed, and it has not called {type(self.model).__name__} in training mode, so "
                f"that nothing is planned: {how}"
            )

    def end(self) -> None:
        """The model is a plain one again."""
        if self.model is not None:
            restore(self.model)
            self.model = None

    def _made(self, plan: Plan) -> None:
        self.plan = plan
        if self.on_plan is not None:
            self.on_plan(plan)
