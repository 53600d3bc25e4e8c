"""Calls of operators as data: fake tensors become specifications that can be hashed, and made real to try a call."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def tensors_in(item: Any) -> list[torch.Tensor]:
    """The tensors in nested containers."""
    return [t for t in tree_leaves(item) if isinstance(t, torch.Tensor)]


class TensorSpec(tuple):  # type: ignore[type-arg]
    """Shape, strides, offset, dtype and storage size of a tensor: all that its kernel's cost depends on."""

    @staticmethod
    def of(value: Any) -> Any:
        """The specification of a tensor; anything else as it is."""
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage().nbytes() // value.element_size()
            offset = value.storage_offset()
            return TensorSpec((tuple(value.shape), value.stride(), offset, value.dtype, storage))
        return value

    def make(self, device: str = "cpu") -> torch.Tensor:
        """A tensor like it, of zeros: they are valid as indices, probabilities and weights alike."""
        shape, stride, offset, dtype, storage = self
        return torch.zeros(storage, dtype=dtype, device=device).as_strided(shape, stride, offset)


def freeze(item: Any) -> Any:
    """Nested arguments in a form that can be hashed."""
    if isinstance(item, TensorSpec):
        return item
    if isinstance(item, dict):
        return ("dict", tuple((k, freeze(v)) for k, v in sorted(item.items())))
    if isinstance(item, (list, tuple)):
        return ("list", tuple(freeze(v) for v in item))
    return item


def thaw(item: Any, device: str = "cpu") -> Any:
    """Inverse of :func:`freeze`, with tensors for specifications."""
    if isinstance(item, TensorSpec):
        return item.make(device)
    if isinstance(item, tuple) and len(item) == 2 and item[0] == "dict":
        return {k: thaw(v, device) for k, v in item[1]}
    if isinstance(item, tuple) and len(item) == 2 and item[0] == "list":
        return [thaw(v, device) for v in item[1]]
    return item
