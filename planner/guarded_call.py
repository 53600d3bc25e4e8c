"""What a rewritten module calls in the place of its own forward: guarded by TorchDynamo, and never passed over."""

from __future__ import annotations

import random
import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingImports]

from graph_capture.dynamo import capture_error, check_arguments, dynamo_settings, traceable
from graph_capture.watchers import unwatched
from planner.backend import PlannedBackend
from planner.code_state import CodeState
from planner.decide import PlanChangedWarning
from planner.errors import CaptureError, PlanMismatchError, PlannerError, RewriteError
from planner.plan_file import Plan
from planner.planned_call import INSIDE_ANOTHER, PlannedCall
from planner.ranks import compare_plans, data_parallel_ranks, is_fully_sharded
from planner.switches import refuse_checkpointing
from planner.world import shown, world_differences


class GuardedCall(PlannedCall):
    """What a rewritten module calls in the place of its forward.

    **Fields:**

    - `backend`: compiles every guarded graph, and keeps the records.
    - `plan`: what it runs; the ranks of a data-parallel run compare theirs before the first step.
    """

    def __init__(self, model: nn.Module, backend: PlannedBackend, changes: list[str], plan: Plan) -> None:
        self.backend, self.plan = backend, plan
        self._model = model
        self._changes = changes
        self._compared: set[tuple[int, ...]] = set()
        self._forget()

    def _forget(self) -> None:
        """Start without any compiled program; Dynamo keeps them on the code object, which is a new one."""
        self._sharded = is_fully_sharded(self._model)
        if self._sharded:
            _refuse_sharded_children(self._model)
        function = traceable(self._model.forward if self._sharded else self._model._call_impl)
        self._compiled = torch.compile(function, backend=self.backend, fullgraph=True, dynamic=False)
        self._code = CodeState.of(self._model)

    @torch.compiler.disable(reason=INSIDE_ANOTHER)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call: guarded, compiled where it is new, with our errors in the place of the compiler's."""
        if self._code.changed() or self._sharded != is_fully_sharded(self._model):
            self._forget()
        if not torch.is_grad_enabled():
            return self._model._call_impl(*args, **kwargs)  # the plain model: what is generated has ever new shapes
        if peek_interpreter_stack() is not None:
            raise RewriteError(
                "a planned model is called inside of a transform of torch.func (grad, vjp, jvp, vmap), which its "
                "backward program does not know. Call planner.restore(model) before it."
            )
        if self._model.training:
            self._compare()
        return self._among_hooks(args, kwargs) if self._sharded else self._run(args, kwargs)

    def _compare(self) -> None:
        """Compare the plan with the other ranks', once for each group of ranks that the model runs in."""
        ranks = data_parallel_ranks(self._model)
        if len(ranks) > 1 and ranks not in self._compared:
            compare_plans(ranks, f"{self.backend.compiler} {self.plan.identity}", repr(self.plan))
            self._compared.add(ranks)

    def _among_hooks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """FSDP gathers and frees the parameters in hooks, which run outside of the program, as around a plain module.

        The hooks stand in `Module._call_impl` and so does the call of `forward`: for its time, ours stands there.
        """
        own = vars(self._model)
        before = own.get("forward")
        own["forward"] = lambda *a, **k: self._run(a, k)
        try:
            return self._model._call_impl(*args, **kwargs)
        finally:
            if before is None:
                del own["forward"]
            else:
                own["forward"] = before

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        compiled_before = len(self.backend.records)
        state = random.getstate(), _numpy_state()
        try:
            with dynamo_settings(), unwatched():
                result = self._compiled(args, kwargs)
        except Exception as error:
            check_arguments(type(self._model).forward.__get__(self._model), args, kwargs)
            own = own_error(error)
            if own is error:
                raise
            if isinstance(own, PlanMismatchError):
                own = PlanMismatchError(f"{own}{self._besides(args, kwargs)}")
            raise own from error
        finally:
            while self._changes:
                reason = f"planned again: {self._changes.pop()}{self._besides(args, kwargs)}"
                warnings.warn(PlanChangedWarning(reason), stacklevel=_user_level())
        if len(self.backend.records) > compiled_before and (random.getstate(), _numpy_state()) != state:
            self._forget()
            raise RewriteError(
                "the forward draws random numbers from Python's `random` or from NumPy: a captured graph would repeat "
                "the same ones at every step. Draw them from torch, or pass them in as arguments."
            )
        if len(self.backend.records) > compiled_before:
            refuse_checkpointing(self._model)  # it may have been switched on since, and would be passed over in silence
            self._code = CodeState.of(self._model)  # there may be other modules by now
        return result

    def _besides(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """What else differs from the world that the plan was made in, as the end of a message."""
        found = world_differences(self.plan, self._model, args, kwargs)
        return f" What differs from the plan: {shown(found)}." if found else ""


def _refuse_sharded_children(model: nn.Module) -> None:
    inside = [name for name, module in model.named_modules() if module is not model and is_fully_sharded(module)]
    if inside:
        raise RewriteError(
            f"{inside[0]!r} inside of the planned {type(model).__name__} is fully sharded by itself: its parameters "
            "come and go while the planned program runs. Plan each sharded block (planner.plan_blocks) instead."
        )


def _user_level() -> int:
    """How many frames up, seen from the caller, the first one is that is neither torch's nor the planner's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("torch.", "planner.")):
        frame, level = frame.f_back, level + 1
    return level


def _numpy_state() -> Any:
    import numpy

    kind, keys, *rest = numpy.random.get_state()
    return kind, keys.tobytes(), *rest  # type: ignore[union-attr]


def own_error(error: BaseException) -> BaseException:
    """The planner's own error inside of the compiler's, or the compiler's reason in one message."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, (PlannerError, CaptureError)):
            return inner
        inner = getattr(inner, "inner_exception", None) or inner.__cause__
    if type(error).__module__.startswith("torch._dynamo"):
        return capture_error(error)
    return error
