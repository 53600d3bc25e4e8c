"""The options of ``torch.compile(model, backend="checkpoint_planner", options={...})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner.budget import Budget, parse_budget
from planner.errors import RewriteError
from planner.pins import Pins, pins_of
from planner.plan_file import Plan
from solvers.auto import Auto
from solvers.solution import Solver, with_time_limit


class CompileOptions(BaseModel):
    """What the backend is told; exactly one of `budget` and `plan`.

    **Fields:**

    - `budget`: as in :func:`planner.plan`. It covers what the compiled function's graph holds: its parameters, inputs,
      gradients, activations and workspace, and `extra_bytes`.
    - `plan`: a :class:`~planner.plan_file.Plan` or the path of its file.
    - `on_change`: what happens with another graph than the plan's, as in :func:`planner.rewrite`; `"error"` if it is
      not given, since a plan that would be left aside is a mistake.
    - `compiler`: as in :func:`planner.rewrite`.
    - `on_plan`: called with the plan that was made for the budget.
    - `device`, `solver`, `time_limit_seconds`, `gradient_accumulation`, `extra_bytes`, `keep`, `recompute`: as in
      :func:`planner.plan`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    budget: Any = None  # read by parse_budget, whose messages say what to write
    plan: Plan | str | Path | None = None
    on_change: Literal["replan", "error"] = "error"
    compiler: Literal["eager", "inductor"] = "eager"
    on_plan: Callable[[Plan], None] | None = None
    device: str | None = None
    solver: Solver | None = None
    time_limit_seconds: float | None = None
    gradient_accumulation: bool = True
    extra_bytes: dict[str, int] = Field(default_factory=dict)
    keep: str | Sequence[str] = ()
    recompute: str | Sequence[str] = ()

    @property
    def given_plan(self) -> Plan | None:
        """The plan that was given, read from its file if it is a path."""
        if not isinstance(self.plan, (str, Path)):
            return self.plan
        try:
            return Plan.load(self.plan)
        except OSError as error:
            raise RewriteError(f"option 'plan' of torch.compile(backend='checkpoint_planner'): {error}") from error

    @property
    def pins(self) -> Pins:
        """The modules that were pinned."""
        return pins_of(self.keep, self.recompute)

    @property
    def wanted(self) -> Budget:
        """The budget that was given."""
        assert self.budget is not None
        return parse_budget(self.budget)

    @property
    def chosen_solver(self) -> Solver:
        """The solver, with its time limit."""
        solver = self.solver or Auto()
        return solver if self.time_limit_seconds is None else with_time_limit(solver, self.time_limit_seconds)


def read_options(given: Mapping[str, Any] | None, mode: str | None) -> CompileOptions:
    """Read what was given to `torch.compile`; raises :class:`~planner.errors.RewriteError` and says what to write."""
    known = ", ".join(CompileOptions.model_fields)
    if mode is not None:
        raise RewriteError(f"torch.compile's mode={mode!r} is Inductor's; this backend takes options={{...}}: {known}")
    try:
        options = CompileOptions(**dict(given or {}))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"][:1])
        raise RewriteError(
            f"option {where!r} of torch.compile(backend='checkpoint_planner'): {first['msg']}, found "
            f"{first['input']!r}. The options are: {known}"
        ) from error
    if (options.budget is None) == (options.plan is None):
        raise RewriteError(
            "torch.compile(backend='checkpoint_planner') needs options={'budget': '12GiB'} or options={'plan': plan}, "
            "and not both"
        )
    if options.plan is not None and options.pins:
        raise RewriteError(
            "options 'keep' and 'recompute' of torch.compile(backend='checkpoint_planner') go with a budget: a plan "
            "has its own pins, plan(model, budget, keep=..., recompute=...) makes it"
        )
    return options
