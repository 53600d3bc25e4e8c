"""FLOPs of an ATen operator: torch's own formulas, and those that torch has not.

``torch.utils.flop_counter`` knows matrix products, convolutions and the CUDA attention kernels. The formulas here add
the CPU attention kernel, grouped matrix products and the fused recurrent layers, without which attention and experts
would look nearly free. Every formula counts a multiply-add as 2 FLOPs, as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Shape = tuple[int, ...]


def flops_of(node: fx.Node) -> int | None:
    """FLOPs of one execution, or `None` if no formula is known and the operator is to be priced by bytes moved."""
    packet = getattr(node.target, "overloadpacket", None)
    formula = _OWN.get(str(packet))
    if formula is not None:
        return formula(node)
    if packet not in flop_registry:
        return None
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    return int(flop_registry[packet](*args, **kwargs, out_val=node.meta["val"]))


def _shape(node: Any) -> Shape:
    return tuple(node.meta["val"].shape)


def _attention(query: Shape, key: Shape, value: Shape, products: int) -> int:
    """`products` pairs of matrix products of scaled-dot-product attention: 1 forward, and 2.5 backward (recomputed)."""
    batch, heads, length, size = query
    forward = 2 * batch * heads * length * key[-2] * size + 2 * batch * heads * length * key[-2] * value[-1]
    return forward * products // 2


def _cpu_attention(node: fx.Node) -> int:
    query, key, value = (_shape(a) for a in node.args[:3])
    return _attention(query, key, value, 2)


def _cpu_attention_backward(node: fx.Node) -> int:
    query, key, value = (_shape(a) for a in node.args[1:4])
    return _attention(query, key, value, 5)  # scores again, and gradients of scores, query, key and value


def _grouped_mm(node: fx.Node) -> int:
    left, right = _shape(node.args[0]), _shape(node.args[1])
    # Rows of the left operand are dealt out among the groups: each meets one group's matrix.
    if len(left) == 2 and len(right) == 2:
        return 2 * left[0] * left[1] * right[1]
    if len(left) == 2:
        return 2 * left[0] * left[1] * right[-1]
    return 2 * math.prod(left) * right[-1]


def _grouped_mm_backward(node: fx.Node) -> int:
    """The gradients of both operands each cost as much as the product; the first argument is the result's gradient."""
    gradient, left = _shape(node.args[0]), _shape(node.args[1])
    return 2 * gradient[0] * gradient[-1] * left[-1]


def _recurrent(node: fx.Node, products: int) -> int:
    """A recurrent layer multiplies every time step's input and hidden state with its weights."""
    steps = math.prod(_shape(node.args[0])[:-1])
    weights = [a for a in node.all_input_nodes if len(_shape_or_none(a)) == 2]
    return products * steps * sum(math.prod(_shape(w)) for w in weights)


def _shape_or_none(node: fx.Node) -> Shape:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


_OWN: dict[str, Callable[[fx.Node], int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _cpu_attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _cpu_attention_backward,
    "aten._grouped_mm": _grouped_mm,
    "transformers.grouped_mm_fallback": _grouped_mm,
    "transformers.grouped_mm_fallback_backward": lambda node: 2 * _grouped_mm_backward(node),
    "aten.mkldnn_rnn_layer": lambda node: _recurrent(node, 2),
    "aten.mkldnn_rnn_layer_backward": lambda node: _recurrent(node, 4),
    "aten._cudnn_rnn": lambda node: _recurrent(node, 2),
    "aten._cudnn_rnn_backward": lambda node: _recurrent(node, 4),
}
