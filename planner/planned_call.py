"""What stands in the place of a planned module's own call."""

from __future__ import annotations

import abc
from typing import Any

from torch import nn

INSIDE_ANOTHER = (
    "a planned model is called inside of torch.compile. Its plan is kept by a graph break before and after it; with "
    "fullgraph=True there can be none: compile the model by backend='checkpoint_planner', or call it outside of the "
    "compiled function"
)


class PlannedCall(abc.ABC):
    """`Module._compiled_call_impl` of a module that has a plan, or will have one at its first step."""

    @abc.abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the module; decorated as what TorchDynamo does not trace, for the reason `INSIDE_ANOTHER`."""


def planned_call(module: nn.Module) -> PlannedCall | None:
    """What runs a module's plan; `None` if it has none."""
    call: Any = vars(module).get("_compiled_call_impl")
    return call if isinstance(call, PlannedCall) else None
