"""A copy of a model that has no memory: same modules, parameters and buffers, every tensor a fake one.

Capture works on this copy, so it allocates no activation, moves no parameter, and leaves no trace in the module.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

from graph_capture.errors import CaptureError


def fake_mode_of(model: nn.Module, inputs: Any) -> FakeTensorMode:
    """The mode that the model's or inputs' fake tensors already belong to, or a new one."""
    tensors = [*model.parameters(), *model.buffers(), *(t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor))]
    modes = {id(t.fake_mode): t.fake_mode for t in tensors if isinstance(t, FakeTensor)}
    if len(modes) > 1:
        raise CaptureError(
            "the model's parameters and the example inputs are fake tensors of different FakeTensorModes; make both "
            "under the same mode"
        )
    mode = next(iter(modes.values()), None) or FakeTensorMode()
    mode.allow_non_fake_inputs = True
    return mode


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Copy a module, with a fake tensor in the place of every parameter, buffer and tensor attribute."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        held += [t for value in vars(module).values() if not isinstance(value, dict) for t in _tensors(value)]
        for tensor in held:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = fake_tensor(tensor, mode)
    try:
        with mode:
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied ({type(error).__name__}: {error}); planning works on a copy.deepcopy of the "
            "modules, without their tensors. Remove what cannot be copied (locks, files, tensors with a history)."
        ) from error


def fake_inputs(inputs: Any, mode: FakeTensorMode) -> Any:
    """The same nested inputs with fake tensors."""
    return tree_map_only(torch.Tensor, lambda t: fake_tensor(t, mode), inputs)


def fake_tensor(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """One fake tensor; a parameter stays a parameter."""
    if type(tensor) not in (torch.Tensor, nn.Parameter, FakeTensor):
        known = isinstance(tensor, (nn.Parameter, torch.Tensor)) and not is_traceable_wrapper_subclass(tensor)
        if not known:
            raise CaptureError(f"tensors of type {type(tensor).__name__} are not supported")
    if isinstance(tensor, FakeTensor):
        return tensor
    source = tensor.detach()
    fake = mode.from_tensor(source)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    fake.requires_grad_(tensor.requires_grad)
    # autocast keeps the casts of leaves alone, so what is none must not look like one
    return fake if tensor.is_leaf else fake.view_as(fake)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _tensors(item)]
    return []
