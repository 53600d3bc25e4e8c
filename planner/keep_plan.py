"""A plan that is in place is not passed over in silence by a later `compile`.

Two things of torch would do so: `model.compile(...)` puts its own program in the place of the plan's, and TorchDynamo,
tracing a function that calls a planned model, inlines the model's `forward` without asking what its call is. The first
becomes an error. The second becomes a graph break: the function is compiled around the model, which runs its plan;
where graph breaks are forbidden, Dynamo's error gives the reason.

Written for torch 2.11 to 2.13: ``UnspecializedNNModuleVariable.call_function`` is private to TorchDynamo.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable

from planner.errors import RewriteError
from planner.planned_call import planned_call


@functools.cache
def keep_plans() -> None:
    """From now on, in this process. Modules without a plan are treated as before."""
    compile_module, inline_module = nn.Module.compile, UnspecializedNNModuleVariable.call_function

    @functools.wraps(compile_module)
    def compile_unless_planned(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if planned_call(self) is not None:
            raise RewriteError(
                f"compile() would take the plan of this {type(self).__name__} away. A planned model is compiled "
                "already: for Inductor's kernels use rewrite(model, plan, compiler='inductor'), and to go without the "
                "plan call planner.restore(model) first."
            )
        compile_module(self, *args, **kwargs)

    @functools.wraps(inline_module)
    def inline_unless_planned(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        call = planned_call(self.value)
        if call is None:
            return inline_module(self, tx, args, kwargs)
        # It must not be traced, and says why: this raises Dynamo's own exception for a graph break.
        return VariableTracker.build(tx, type(call).__call__).call_function(tx, [self, *args], kwargs)

    nn.Module.compile = compile_unless_planned  # type: ignore[method-assign]
    UnspecializedNNModuleVariable.call_function = inline_unless_planned  # type: ignore[method-assign]
