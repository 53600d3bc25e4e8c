"""Dropout on the CPU, rounded as eager rounds it.

In eager the CPU multiplies by a noise of the input's dtype, zeros and ``1 / (1 - p)`` rounded to that dtype. A traced
graph holds ``native_dropout``, whose backward multiplies by ``1 / (1 - p)`` unrounded: in bf16 and fp16 the
gradients differ in their last bit for most `p`, in float32 the results do for some. On other devices eager runs
``native_dropout`` itself.
"""

from __future__ import annotations

import numpy
import torch
from torch import fx

from graph_capture.dropout_mask import DROPOUT_MASK, eager_scale

aten = torch.ops.aten


def round_as_in_eager(graph: fx.Graph, *, traceable: bool = False) -> None:
    """Let every dropout of a joint graph on the CPU round as in eager, in place; a second time changes nothing.

    With `traceable`, for a compiler that rounds in its own way, only gradients are rounded so.
    """
    for node in graph.find_nodes(op="call_function", target=aten.native_dropout_backward.default):
        probability = _probability(node.args[1])
        if probability is not None and _on_cpu(node):
            node.args = (*node.args[:2], eager_scale(probability, node.meta["val"].dtype))
    for node in graph.find_nodes(op="call_function", target=aten.native_dropout.default):
        probability = _probability(node)
        if traceable or probability is None or not _on_cpu(node):
            continue
        dtype = node.meta["val"][0].dtype
        if dtype is torch.float32 and float(numpy.float32(1 / (1 - probability))) != eager_scale(probability, dtype):
            node.target = torch.ops.checkpoint_planner.dropout.default


def dropout_as_in_eager(x: torch.Tensor, probability: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``native_dropout`` (result and mask, of the shape of `x`) with eager's rounding and eager's random numbers."""
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - probability)
    return x.mul(mask).mul_(eager_scale(probability, x.dtype)), mask


def _probability(node: object) -> float | None:
    """The probability of the dropout that a node is, or that it takes the mask of; `None` if there is none to round."""
    if isinstance(node, fx.Node) and getattr(node.target, "__name__", "") == "getitem":
        node = node.args[0]
    if isinstance(node, fx.Node) and node.target is DROPOUT_MASK:
        return node.args[2]  # type: ignore[return-value]
    if not (isinstance(node, fx.Node) and str(node.target) in _DROPOUTS):
        return None
    probability, train = node.args[1], node.args[2]
    return probability if train and isinstance(probability, float) and 0 < probability < 1 else None


_DROPOUTS = ("aten.native_dropout.default", "checkpoint_planner.dropout.default")
_LIBRARY = torch.library.Library("checkpoint_planner", "FRAGMENT")  # an operator, so that it can be run again by name
_LIBRARY.define("dropout(Tensor x, float p, bool? train) -> (Tensor, Tensor)")
_LIBRARY.impl("dropout", dropout_as_in_eager, "CPU")


def _on_cpu(node: fx.Node) -> bool:
    value = node.meta["val"]
    return (value[0] if isinstance(value, tuple) else value).device.type == "cpu"
