"""Max pooling whose backward pass needs offsets inside of windows, one byte each, and nothing of its input.

Inductor makes offsets in the forward pass and indices of them where they are read
(:mod:`~graph_capture.decompositions`). The gradient is scattered to the indices; of the input only the shape is read,
but a graph says that it is, and a schedule would keep it, or make it again.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._prims_common import suggest_memory_format

aten = torch.ops.aten
BACKWARD = aten.max_pool2d_with_indices_backward.default
AVERAGING_BACKWARDS = {aten.avg_pool2d_backward.default: 2, aten.avg_pool3d_backward.default: 3}
MOST_WINDOWS = 25
"""An element may lie in so many windows, where Inductor generates a kernel for an average pooling's backward."""

OFFSETS = "prims::_low_memory_max_pool_with_offsets"
INDICES = "prims::_low_memory_max_pool_offsets_to_indices"


def makes_offsets(node: fx.Node) -> bool:
    """Whether a node is a max pooling that makes offsets."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.name() == OFFSETS


def makes_indices(node: fx.Node) -> bool:
    """Whether a node makes indices, of 8 bytes, out of offsets, element by element."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.name() == INDICES


def release_pooled_inputs(graph: fx.Graph) -> None:
    """In the backward of a max pooling by offsets let zeros stand for its input, in place; nobody makes them."""
    for node in graph.find_nodes(op="call_function", target=BACKWARD):
        indices = node.args[7]
        if isinstance(indices, fx.Node) and makes_indices(indices):
            _let_zeros_stand(node)


def release_averaged_inputs(graph: fx.Graph) -> None:
    """The same in the backward of an average pooling, for Inductor: a kernel that it generates reads the shape alone.

    Where many windows meet in an element it calls torch's kernel, for which somebody would make the zeros.
    """
    for target, dimensions in AVERAGING_BACKWARDS.items():
        for node in graph.find_nodes(op="call_function", target=target):
            kernel, stride = node.args[2], node.args[3] or node.args[2]
            if (-(-max(kernel) // min(stride))) ** dimensions <= MOST_WINDOWS:  # type: ignore[arg-type]
                _let_zeros_stand(node)


def _let_zeros_stand(node: fx.Node) -> None:
    """Let the backward of a pooling read zeros of the shape and the layout of its input, its second argument."""
    graph, source = node.graph, node.args[1]
    if not isinstance(source, fx.Node):
        return
    recorded = source.meta["val"]
    last = recorded.dim() == 4 and suggest_memory_format(recorded) is torch.channels_last
    shape = [recorded.shape[i] for i in (0, 2, 3, 1)] if last else list(recorded.shape)
    with graph.inserting_before(node), recorded.fake_mode:
        kinds = {"dtype": recorded.dtype, "device": recorded.device}
        shaped = graph.call_function(aten.full.default, (shape, 0), kinds)
        shaped.meta = {**node.meta, "val": aten.full.default(shape, 0, **kinds)}
        if last:
            whole, order = shaped, [0, 3, 1, 2]
            shaped = graph.call_function(aten.permute.default, (whole, order))
            shaped.meta = {**node.meta, "val": aten.permute.default(whole.meta["val"], order)}
    node.args = (node.args[0], shaped, *node.args[2:])


def scattering_bytes(node: fx.Node) -> int:
    """Scratch memory of such a backward: indices and gradient where several threads scatter, and a sum beside them.

    The sum is in float32 where the gradient is of half precision, and contiguous where the result is channels-last.
    """
    (result,), (given,) = (_tensors(n) for n in (node, node.args[0]))
    scratch = given.numel() * (8 + given.element_size())
    if result.element_size() < 4:
        return scratch + 4 * result.numel()
    return scratch + (0 if result.is_contiguous() else result.numel() * result.element_size())


def _tensors(node: object) -> list[torch.Tensor]:
    assert isinstance(node, fx.Node)
    return [node.meta["val"]]
