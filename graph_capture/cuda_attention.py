"""Which attention kernel CUDA would run, and the same call on tensors that are not there.

On a CPU, `scaled_dot_product_attention` becomes the CPU's kernel. For a card that is not here, the choice is made by
the conditions of ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`` (torch 2.11 to 2.13), in the card's order:
cuDNN first on compute capability 9 and 10, else flash, memory-efficient, the mathematics. The chosen operator's shape
function and derivative need no card, so that the graph holds its outputs: log-sum-exp, seed and offset of dropout.

Assumed of the machine that trains, since it cannot be asked: cuDNN newer than 9.15.0, as in torch's own wheels, and
the switches ``torch.backends.cuda.enable_*_sdp`` and ``TORCH_CUDNN_SDPA_DEPRIORITIZED`` as they are here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F

from graph_capture.devices import Device

aten = torch.ops.aten
AttentionKernel = Literal["cudnn", "flash", "efficient", "math"]
HALF = (torch.float16, torch.bfloat16)
MASK_ALIGNMENT = 16
"""The memory-efficient kernel wants rows of the mask of a multiple of so many elements."""


def choose_attention(
    device: Device,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> AttentionKernel:
    """The first kernel in the card's order whose conditions hold; tensors are (batch, heads, length, head size)."""
    call = (device, query, key, value, mask, dropout_p, is_causal, enable_gqa)
    order: list[tuple[AttentionKernel, Callable[..., bool]]] = [("flash", _flash), ("efficient", _efficient)]
    if device.compute_capability[0] in (9, 10) and os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") != "1":
        order.insert(0, ("cudnn", _cudnn))
    if not _common(query, key, value, enable_gqa):
        return "math"
    for name, possible in order:
        if possible(*call):
            return name
    return "math"


def attention_of(device: Device) -> Callable[..., torch.Tensor]:
    """A function in the place of `scaled_dot_product_attention`, which calls the kernel that the card would run."""

    def cuda_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        kernel = choose_attention(device, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        if kernel == "flash":
            return _run_flash(query, key, value, dropout_p, is_causal, scale)
        mask = _additive(attn_mask, query.dtype)
        if kernel == "cudnn":
            return aten._scaled_dot_product_cudnn_attention(
                query, key, value, mask, trained, dropout_p, is_causal, False, scale=scale
            )[0]
        if kernel == "efficient":
            mask = None if mask is None else _aligned(mask, query, key)
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, mask, trained, dropout_p, is_causal, scale=scale
            )[0]
        return aten._scaled_dot_product_attention_math(
            query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]

    return cuda_attention


def _common(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> bool:
    """Conditions of all fused kernels: four dimensions, equal dtypes and batches, no empty sequence, heads that fit."""
    tensors = (query, key, value)
    if any(t.dim() != 4 for t in tensors) or len({t.dtype for t in tensors}) > 1:
        return False
    if len({t.size(0) for t in tensors}) > 1 or 0 in (query.size(2), key.size(2)):
        return False
    heads = [t.size(1) for t in tensors]
    if enable_gqa:
        return heads[1] == heads[2] and heads[0] % heads[1] == 0
    return len(set(heads)) == 1


def _cudnn(
    device: Device,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    if not torch.backends.cuda.cudnn_sdp_enabled() or torch.are_deterministic_algorithms_enabled():
        return False
    sizes = query.size(-1), value.size(-1)
    fits = max(sizes) <= 128 or sizes == (192, 128)
    length = query.size(2), key.size(2)
    return (
        query.dtype in HALF
        and fits
        and not any(size % 8 for size in sizes)
        and max(query.shape[:2]) <= 65535
        and length[1] != 1
        and not (dropout_p and length[0] == 1)
        and float(dropout_p * 16).is_integer()
        and (mask is None or (not mask.requires_grad and _mask_fits(mask, query, key)))
        and _dense_rows(query, key, value, mask, single=True)
    )


def _flash(
    device: Device,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    size = query.size(-1)
    if not torch.backends.cuda.flash_sdp_enabled() or device.compute_capability < (8, 0) or mask is not None:
        return False
    small = (8, 6) <= device.compute_capability <= (8, 9) or device.compute_capability >= (12, 0)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if trained and small and not (size <= 192 or (not dropout_p and size > 224)):
        return False
    return (
        query.dtype in HALF
        and size <= 256
        and size == key.size(-1) == value.size(-1)
        and not (is_causal and query.size(2) != key.size(2))
        and _dense_rows(query, key, value, mask, single=True)
    )


def _efficient(
    device: Device,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    if not torch.backends.cuda.mem_efficient_sdp_enabled():
        return False
    if not query.size(1) == key.size(1) == value.size(1):  # grouped heads: not up to torch 2.13
        return False
    modern = device.compute_capability >= (8, 0)
    if query.dtype not in ((torch.float32, *HALF) if modern else (torch.float32, torch.float16)):
        return False
    half = query.dtype in HALF
    alignment = 4 if modern else 1
    if modern or half:  # tensor cores read 128 bits at a time
        alignment = max(alignment, 128 // (16 if half else 32))
    sizes = query.size(-1), value.size(-1)
    aligned = query.size(-1) == key.size(-1) and not any(size % alignment for size in sizes)
    return aligned and _dense_rows(query, key, value, mask, single=False)


def _mask_fits(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    wanted = (query.size(0), query.size(1), query.size(2), key.size(2))
    return mask.dim() in (2, 4) and all(m in (1, w) for m, w in zip(mask.shape, wanted[4 - mask.dim() :], strict=True))


def _dense_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, single: bool
) -> bool:
    dense = all(t.stride(-1) == 1 for t in (query, key, value)) or (single and query.size(-1) == 1)
    return dense and (mask is None or mask.stride(-1) == 1)


def _run_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> torch.Tensor:
    """Head sizes are padded to a multiple of 8; the scale is that of the size before."""
    size = query.size(-1)
    if size % 8:
        query, key, value = (F.pad(t, (0, 8 - size % 8)) for t in (query, key, value))
    scale = 1 / math.sqrt(size) if scale is None else scale
    result = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return result[..., :size] if size % 8 else result


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> Any:
    """A boolean mask as one that is added."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -math.inf)


def _aligned(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    mask = mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))
    length = mask.size(-1)
    if length % MASK_ALIGNMENT:
        return F.pad(mask, (0, MASK_ALIGNMENT - length % MASK_ALIGNMENT))[..., :length]
    return mask.contiguous() if any(stride % MASK_ALIGNMENT for stride in mask.stride()[:3]) else mask
