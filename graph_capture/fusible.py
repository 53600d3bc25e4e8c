"""Which operators are parts of the kernels that Inductor generates, and how nodes hang together through views.

Written for torch 2.11 to 2.13: the list of what fuses is PyTorch's own, that of its min-cut partitioner; the list of
what does not is Inductor's, of the operators that it calls.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import fx
from torch._functorch.partitioners import get_default_op_list

from graph_capture.dropout_mask import DROPOUT_MASK
from graph_capture.flops import flops_of
from graph_capture.joint import is_mutation, is_random, storage_key, tensors_of
from graph_capture.pooling import BACKWARD, makes_indices, scattering_bytes

aten = torch.ops.aten
DECOMPOSED = frozenset(
    {
        aten._softmax,
        aten._softmax_backward_data,
        aten.native_layer_norm,
        aten.native_layer_norm_backward,
        aten.native_group_norm,
        aten.native_group_norm_backward,
        aten.slice_backward,
        aten.select_backward,
        aten.upsample_nearest2d,
        aten.upsample_bilinear2d,
        aten.max_pool2d_with_indices_backward,
    }
)
"""Operators that Inductor decomposes into pointwise ones and reductions; what is taken apart before is none of them."""
_POINTWISE = frozenset(
    {
        aten.elu_backward,
        aten.hardshrink_backward,
        aten.hardsigmoid_backward,
        aten.hardswish_backward,
        aten.hardtanh_backward,
        aten.leaky_relu_backward,
        aten.mish_backward,
        aten.softplus_backward,
        aten.softshrink_backward,
    }
)
"""Operators that work element by element, and that torch does not tag so."""
_SOFTMAX = frozenset({aten._softmax, aten._softmax_backward_data})


def statistics_bytes(node: fx.Node) -> int:
    """Scratch memory of a generated operator: a softmax has a maximum, a sum and its logarithm for each row."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    if target is BACKWARD:
        return scattering_bytes(node)
    if target.overloadpacket not in _SOFTMAX:
        return 0
    place = next(i for i, argument in enumerate(target._schema.arguments) if argument.name == "dim")
    (result,) = tensors_of(node)
    rows = result.numel() // max(1, result.shape[cast("int", node.args[place])] if result.dim() else 1)
    return 3 * rows * max(4, result.element_size())


def copied_bytes(node: fx.Node) -> int:
    """Scratch memory of a called operator beyond eager's.

    What is scattered into an embedding is masked in a copy; results of complex numbers are made twice.
    """
    if any(t.is_complex() for t in tensors_of(node)):
        return sum(bytes_read(t) for t in tensors_of(node))
    if node.target is DROPOUT_MASK and tensors_of(node)[0].device.type != "cpu":
        return 2 * tensors_of(node)[0].numel() * node.kwargs["dtype"].itemsize  # type: ignore[union-attr]
    if node.target is not aten.embedding_dense_backward.default:
        return 0
    return bytes_read(tensors_of(node.all_input_nodes[0])[0])


def results(node: fx.Node) -> list[fx.Node]:
    """The node, or the pieces of its result."""
    pieces = [u for u in node.users if not isinstance(u.target, torch._ops.OpOverload) and u.op == "call_function"]
    return pieces or [node]


def views(node: fx.Node) -> list[fx.Node]:
    """The views of a node, and those of its views."""
    return [v for user in node.users if is_view(user) for v in (user, *views(user))]


def consumers(node: fx.Node) -> list[fx.Node]:
    """Who reads a node, through any views of it; the output node for what is returned."""
    found: list[fx.Node] = []
    for user in node.users:
        found += consumers(user) if is_view(user) else [user]
    return found


@functools.cache
def _fusible() -> frozenset[Any]:
    return frozenset(get_default_op_list().fusible_ops)


@functools.cache
def _called_by_inductor() -> frozenset[Any]:
    """Operators that Inductor has no kernel of its own for; it brings no small part of torch with it."""
    from torch._inductor.lowering import fallbacks

    return frozenset(fallbacks)


def is_generated(node: fx.Node) -> bool:
    """Whether Inductor generates a kernel for an operator, rather than calling one."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or is_random(node) or is_mutation(node) or flops_of(node):
        return False
    if target.namespace not in ("aten", "prims") or target in _called_by_inductor():
        return False
    if any(t.is_complex() for n in (node, *node.all_input_nodes) for t in tensors_of(n)):
        return False
    return torch.Tag.pointwise in target.tags or target.overloadpacket in _fusible() | DECOMPOSED | _POINTWISE


def is_pointwise(node: fx.Node) -> bool:
    """Whether an operator makes each element of its one result, a storage of its own, from a few elements."""
    if not is_generated(node) or is_view(node) or len(tensors_of(node)) != 1:
        return False
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    known = target.overloadpacket in _CREATE_OR_CONVERT | _POINTWISE or makes_indices(node)
    return torch.Tag.pointwise in target.tags or known


_CREATE_OR_CONVERT = frozenset({aten._to_copy, aten.arange, aten.full, aten.scalar_tensor, aten.triu, aten.tril})


def is_view(node: fx.Node) -> bool:
    """Whether a node's results all lie in storages of its inputs."""
    if node.op != "call_function" or is_mutation(node):
        return False
    given = {storage_key(t) for i in node.all_input_nodes for t in tensors_of(i)}
    made = [storage_key(t) for t in tensors_of(node)]
    return bool(made) and all(key in given for key in made)


def bytes_read(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; an expanded one is no larger than what it lies in."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
