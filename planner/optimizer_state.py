"""How much memory an optimizer's state takes, before its first step has made it."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from planner.errors import RewriteError

LABEL = "optimizer state"
"""The line of the budget."""


def optimizer_state_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's state from its first step on, as 8 bytes a parameter for AdamW in float32.

    State that is there already is counted. Otherwise a copy of the optimizer makes one step on the meta device, where
    tensors have no memory. Raises :class:`~planner.errors.RewriteError` if the optimizer cannot do that.
    """
    inner: Any = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer  # accelerate and Lightning wrap it
    if any(inner.state.values()):
        return _size(inner.state.values())
    own = dict(vars(inner))
    groups, state = own.pop("param_groups", None), own.pop("state", None)
    if groups is None or state is None or any(isinstance(v, _REAL) for v in tree_leaves(list(own.values()))):
        raise _cannot(inner, "it holds tensors or an optimizer beside its state, which a trial would change")
    twin = object.__new__(type(inner))
    hooks: dict[str, Any] = {f"_optimizer_step_{when}_hooks": OrderedDict() for when in ("pre", "post")}
    vars(twin).update(own | hooks)
    vars(twin).update(state=defaultdict(dict), param_groups=[_on_meta(group) for group in groups])
    try:
        type(inner).step(twin)
    except Exception as error:  # whatever an optimizer does with tensors that hold no data
        raise _cannot(inner, f"{type(error).__name__}: {error}") from error
    return _size(twin.state.values())


_REAL = (torch.Tensor, torch.optim.Optimizer)


def _cannot(optimizer: Any, reason: str) -> RewriteError:
    return RewriteError(
        f"the state of {type(optimizer).__name__} cannot be counted before its first step ({reason}). Say how large it "
        f"is: extra_bytes={{{LABEL!r}: ...}}."
    )


def _on_meta(group: dict[str, Any]) -> dict[str, Any]:
    parameters: list[torch.Tensor] = []
    for parameter in group["params"]:
        if parameter.requires_grad:
            parameters.append(torch.nn.Parameter(torch.empty_like(parameter, device="meta")))
            parameters[-1].grad = torch.empty_like(parameters[-1])
    plain = {name: False for name in ("fused", "foreach") if name in group}  # same state, kernels that meta has
    return {**group, "params": parameters, **plain}


def _size(state: Iterable[Any]) -> int:
    tensors = {id(t): t for entry in state for t in tree_leaves(entry) if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())
