"""The options of ``torch.compile(model, backend="checkpoint_planner", options={...})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from graph_capture.costs import Costs, default_costs
from graph_capture.devices import Device, device_by_name
from graph_capture.graph import Compiler
from planner.budget import Budget, parse_budget
from planner.errors import RewriteError
from planner.pins import Pins, pins_of
from planner.plan_file import Plan
from solvers.auto import chosen_solver
from solvers.hints import Progress
from solvers.schedule import Schedule
from solvers.solution import Solver


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
    - `start`: as in :func:`planner.plan`, or the path of a plan's file.
    - `device`, `costs`, `solver`, `time_limit_seconds`, `gradient_accumulation`, `extra_bytes`, `keep`, `recompute`,
      `progress`: as in :func:`planner.plan`. They go with a budget; a plan has been made with its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    budget: Any = None  # read by parse_budget, whose messages say what to write
    plan: Plan | str | Path | None = None
    on_change: Literal["replan", "error"] = "error"
    compiler: Compiler | None = None
    on_plan: Callable[[Plan], None] | None = None
    device: str | Device | None = None
    costs: Costs | None = None
    solver: Solver | None = None
    time_limit_seconds: float | None = None
    gradient_accumulation: bool = True
    extra_bytes: dict[str, int] = Field(default_factory=dict)
    keep: str | Sequence[str] = ()
    recompute: str | Sequence[str] = ()
    start: Plan | Schedule | str | Path | None = None
    progress: Callable[[Progress], None] | None = None

    @field_validator("device")
    @classmethod
    def _known(cls, device: str | Device | None) -> str | Device | None:
        return device if device in (None, "cuda") else device_by_name(device)

    @property
    def given_plan(self) -> Plan | None:
        """The plan that was given, read from its file if it is a path."""
        return _load("plan", self.plan) if isinstance(self.plan, (str, Path)) else self.plan

    @property
    def given_start(self) -> Plan | Schedule | None:
        """What the search starts from, read from its file if it is a path."""
        return _load("start", self.start) if isinstance(self.start, (str, Path)) else self.start

    @property
    def chosen_costs(self) -> Costs:
        """Where the operators' seconds come from."""
        return self.costs or default_costs(self.device)

    @property
    def chosen_compiler(self) -> Compiler:
        """The compiler to plan for: the one that was given, else eager."""
        return self.compiler or "eager"

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
        return chosen_solver(self.solver, self.time_limit_seconds)


_MADE_WITH = (
    *("device", "costs", "solver", "time_limit_seconds", "gradient_accumulation", "extra_bytes", "keep", "recompute"),
    *("start", "progress"),
)
"""What a plan has been made with: these options go with a budget."""


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
    ignored = [name for name in _MADE_WITH if name in options.model_fields_set]
    if options.plan is not None and ignored:
        raise RewriteError(
            f"options {', '.join(ignored)} of torch.compile(backend='checkpoint_planner') go with a budget: a plan has "
            f"its own pins, prices and memory lines, plan(model, budget, {ignored[0]}=...) makes it"
        )
    return options


def _load(option: str, path: str | Path) -> Plan:
    try:
        return Plan.load(path)
    except OSError as error:
        raise RewriteError(f"option {option!r} of torch.compile(backend='checkpoint_planner'): {error}") from error
