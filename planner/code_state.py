"""The code that a trace depends on and that TorchDynamo does not guard."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import nn

from graph_capture.watchers import is_tracker


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
    return tuple(hook for table in tables for hook in table.values() if not is_tracker(hook))
