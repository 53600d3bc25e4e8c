"""Dropout as a mask that is drawn, and a product with it: for a compiler that fuses the product.

As one operator dropout writes a result as large as its input beside the mask, and who wants the result again draws all
numbers again, or has kept it. Taken apart, only the mask is drawn, of one byte for each element; the rest is pointwise.
The numbers are eager's: the mask is drawn over memory that looks like the input.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch._prims_common import compute_elementwise_output_strides
from torch.utils._python_dispatch import _disable_current_modes

_LIBRARY = torch.library.Library("checkpoint_planner", "FRAGMENT")  # an operator, so that it can be run again by name
_LIBRARY.define(
    "dropout_mask(int[] size, int[] stride, float p, *, ScalarType dtype, Device device) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.flexible_layout),
)


def _draw(
    size: Sequence[int], stride: Sequence[int], p: float, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What survives a dropout of probability `p` of a tensor of this size, stride and dtype, as booleans."""
    if device.type != "cpu":  # how numbers are dealt to elements is known to the kernel alone
        like = torch.empty_strided(size, stride, dtype=dtype, device=device)
        return torch.native_dropout(like, p, True)[1]
    return torch.empty_strided(size, stride, dtype=torch.bool, device=device).bernoulli_(1 - p)


_LIBRARY.impl("dropout_mask", _draw, "CompositeExplicitAutograd")


@torch.library.register_fake("checkpoint_planner::dropout_mask", lib=_LIBRARY)
def _(
    size: Sequence[int], stride: Sequence[int], p: float, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=torch.bool, device=device)


DROPOUT_MASK: Any = torch.ops.checkpoint_planner.dropout_mask.default


def dropout_apart(x: torch.Tensor, p: float, train: bool | None) -> Any:
    """``native_dropout`` of a tensor of any shape as a mask and a product: result and mask, of the shape of `x`."""
    if train is False or not 0 < p < 1:
        return NotImplemented
    stride = compute_elementwise_output_strides(x)
    mask = DROPOUT_MASK(list(x.shape), list(stride), p, dtype=x.dtype, device=x.device)
    scale = eager_scale(p, x.dtype) if x.device.type == "cpu" else 1 / (1 - p)
    return x * mask * scale, mask


@functools.cache
def eager_scale(probability: float, dtype: torch.dtype) -> float:
    """What eager multiplies the survivors by on a CPU: `1 / (1 - p)`, as a number of `dtype`."""
    with _disable_current_modes():  # programs are emitted while fake tensors are traced
        return torch.ones((), dtype=dtype, device="cpu").div_(1 - probability).item()
