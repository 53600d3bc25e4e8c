"""``rewrite(model, plan)``: the model itself, running the plan's schedule, on one guarded road.

The user's own module is compiled in place (``Module.compile``): class, ``isinstance``, ``config``, ``state_dict`` keys
and the way it is called stay. TorchDynamo guards what a captured graph bakes in; whatever changes between calls is
either answered as the plain model would answer it, or refused with one clear error.
"""

from __future__ import annotations

import operator
import random
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graph_capture.dynamo import capture_error, check_arguments, dynamo_settings, traceable
from planner.backend import PlannedBackend
from planner.decide import Decider, OnChange, PlanChangedWarning
from planner.describe import describe_model
from planner.errors import CaptureError, PlanMismatchError, PlannerError, RewriteError
from planner.plan_file import Plan


def rewrite(model: nn.Module, plan: Plan, *, on_change: OnChange = "replan") -> nn.Module:
    """Let `model` run the schedule of `plan`, in place; returns the same module.

    **Arguments:**

    - `on_change`: what happens when the model is called in a way that the plan was not made for (another mode, other
      arguments, a frozen parameter). The same graph at other shapes keeps the plan's decisions as long as they fit the
      budget. Beyond that, `"replan"` plans again within the same budget and says so with a
      :class:`~planner.decide.PlanChangedWarning`; `"error"` raises :class:`PlanMismatchError`.

    The plan works at the next call. Calls without gradients (`eval`, `no_grad`) run plainly. :func:`restore` takes the
    plan away. Raises :class:`PlanMismatchError` if the plan was made for another model.
    """
    if on_change not in ("replan", "error"):
        raise ValueError(f"on_change must be 'replan' or 'error', not {on_change!r}")
    differences = plan.model.differences(describe_model(model))
    if differences:
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        raise PlanMismatchError(f"the plan was made for another model: {shown}. Plan this model with plan(model, ...).")
    decider = Decider(plan, on_change)
    backend = PlannedBackend(decider.select_loss, decider.decide)
    model._compiled_call_impl = GuardedCall(model, backend, decider.changes)  # type: ignore[assignment]
    return model


def restore(model: nn.Module) -> nn.Module:
    """Take the plan away again: the model runs as plain PyTorch. Returns the same module."""
    model._compiled_call_impl = None
    return model


@dataclass(frozen=True)
class CodeState:
    """The code that a trace depends on and that Dynamo does not guard: global module hooks, and the classes' methods.

    **Fields:**

    - `hooks`: the global hooks of :mod:`torch.nn.modules.module`.
    - `methods`: what the dictionary of each class of the model's modules holds.
    """

    hooks: tuple[Any, ...]
    methods: tuple[tuple[type, tuple[Any, ...]], ...]

    @classmethod
    def of(cls, model: nn.Module) -> CodeState:
        """The state at present."""
        classes = dict.fromkeys(c for module in model.modules() for c in type(module).__mro__)
        own = [c for c in classes if c is not object and not c.__module__.startswith(("torch.nn.", "typing", "abc"))]
        return cls(_global_hooks(), tuple((c, tuple(vars(c).values())) for c in own))

    def changed(self) -> bool:
        """Whether anything was replaced since."""
        if not _same(self.hooks, _global_hooks()):
            return True
        return not all(_same(known, tuple(vars(c).values())) for c, known in self.methods)


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _global_hooks() -> tuple[Any, ...]:
    state = nn.modules.module
    if not state._has_any_global_hook():
        return ()
    tables = (
        state._global_forward_pre_hooks,
        state._global_forward_hooks,
        state._global_backward_pre_hooks,
        state._global_backward_hooks,
    )
    return tuple(hook for table in tables for hook in table.values())


class GuardedCall:
    """What a rewritten module calls in the place of its forward."""

    def __init__(self, model: nn.Module, backend: PlannedBackend, changes: list[str]) -> None:
        self.backend = backend
        self._model = model
        self._changes = changes
        self._forget()

    def _forget(self) -> None:
        """Start without any compiled program; Dynamo keeps them on the code object, which is a new one."""
        function = traceable(self._model._call_impl)
        self._compiled = torch.compile(function, backend=self.backend, fullgraph=True, dynamic=False)
        self._code = CodeState.of(self._model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call: guarded, compiled where it is new, with our errors in the place of the compiler's."""
        if self._code.changed():
            self._forget()
        compiled_before = len(self.backend.records)
        state = random.getstate(), _numpy_state()
        try:
            with dynamo_settings():
                result = self._compiled(args, kwargs)
        except Exception as error:
            check_arguments(self._model.forward, args, kwargs)
            raise _own_error(error) from error
        finally:
            while self._changes:  # the caller's line is two frames up, behind Module.__call__
                warnings.warn(PlanChangedWarning(f"planned again: {self._changes.pop()}"), stacklevel=3)
        if len(self.backend.records) > compiled_before and (random.getstate(), _numpy_state()) != state:
            self._forget()
            raise RewriteError(
                "the forward draws random numbers from Python's `random` or from NumPy: a captured graph would repeat "
                "the same ones at every step. Draw them from torch, or pass them in as arguments."
            )
        if len(self.backend.records) > compiled_before:
            self._code = CodeState.of(self._model)  # there may be other modules by now
        return result


def _numpy_state() -> Any:
    import numpy

    kind, keys, *rest = numpy.random.get_state()
    return kind, keys.tobytes(), *rest  # type: ignore[union-attr]


def _own_error(error: BaseException) -> BaseException:
    """The planner's own error inside of the compiler's, or the compiler's reason in one message."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, (PlannerError, CaptureError)):
            return inner
        inner = getattr(inner, "inner_exception", None) or inner.__cause__
    if type(error).__module__.startswith("torch._dynamo"):
        return capture_error(error)
    return error
