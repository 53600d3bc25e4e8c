"""``rewrite(model, plan)``: the model itself, running the plan's schedule, on one guarded road.

The user's own module is compiled in place (``Module.compile``): class, ``isinstance``, ``config``, ``state_dict`` keys
and the way it is called stay. TorchDynamo guards what a captured graph bakes in; whatever changes between calls is
either answered as the plain model would answer it, or refused with one clear error.
"""

from __future__ import annotations

from typing import get_args

from torch import nn

from planner.backend import Compiler, PlannedBackend
from planner.decide import Decider, OnChange
from planner.describe import describe_model
from planner.errors import PlanMismatchError
from planner.guarded_call import GuardedCall
from planner.inductor_peak import check_kernels, warn_if_over
from planner.keep_plan import keep_plans
from planner.plan_file import Plan
from planner.ranks import refuse_wrapper
from planner.switches import refuse_checkpointing
from planner.world import shown


def rewrite(
    model: nn.Module, plan: Plan, *, on_change: OnChange = "replan", compiler: Compiler | None = None
) -> nn.Module:
    """Let `model` run the schedule of `plan`, in place; returns the same module.

    **Arguments:**

    - `on_change`: what happens when the model is called in a way that the plan was not made for (another mode, other
      arguments, a frozen parameter). The same graph at other shapes keeps the plan's decisions as long as they fit the
      budget. Beyond that, `"replan"` plans again within the same budget and says so with a
      :class:`~planner.decide.PlanChangedWarning`; `"error"` raises :class:`PlanMismatchError`.

    - `compiler`: `"eager"` runs torch's own kernels, bit-equal to the plain model; `"inductor"` compiles the forward
      and every slice of the backward with Inductor, which fuses inside of them and keeps the schedule. If not given,
      the one that the plan was made for. What Inductor fuses is its own decision, so the plan's peak is an estimate
      there and no bound: leave headroom in the plan's `extra_bytes`. A plan that was made for eager kernels counts on
      operators that write into a dying input, which Inductor does not run: one that fits by them alone is said so
      (:class:`~planner.inductor_peak.InductorPeakWarning`).

    The plan works at the next call. Calls without gradients (`eval`, `no_grad`) run plainly. In a DDP or FSDP2 run the
    ranks compare their plans before the first step, and all of them raise if two differ. `model.compile()` is an error
    from now on, since it would take the plan away; :func:`restore` does so.

    Raises :class:`PlanMismatchError` if the plan was made for another model, or for the kernels of another compiler.
    """
    if on_change not in ("replan", "error"):
        raise ValueError(f"on_change must be 'replan' or 'error', not {on_change!r}")
    compiler = compiler if compiler is not None else plan.compiler
    if compiler not in get_args(Compiler):
        raise ValueError(f"compiler must be 'eager' or 'inductor', not {compiler!r}")
    check_kernels(plan, compiler)
    if compiler == "inductor":
        from planner.inductor_compiler import check_compiler

        check_compiler(next((p.device.type for p in model.parameters()), "cpu"))
    refuse_wrapper(model)
    refuse_checkpointing(model)
    differences = plan.model.differences(describe_model(model))
    if differences:
        raise PlanMismatchError(
            f"the plan was made for another model: {shown(differences)}. Plan this model with plan(model, ...)."
        )
    if compiler != plan.compiler:
        warn_if_over(plan)
    keep_plans()
    decider = Decider(plan, on_change)
    backend = PlannedBackend(
        decider.select_loss, decider.decide, compiler=compiler, kernels=plan.compiler, expect=decider.expect
    )
    call = GuardedCall(model, backend, decider.changes, plan)
    model._compiled_call_impl = call  # type: ignore[assignment]
    return model


def restore(model: nn.Module) -> nn.Module:
    """Take the plan away again: the model runs as plain PyTorch. Returns the same module."""
    model._compiled_call_impl = None
    return model
