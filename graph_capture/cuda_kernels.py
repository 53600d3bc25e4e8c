"""The graph that CUDA would run, captured without CUDA.

Autograd does not work on fake CUDA tensors in a build of torch without CUDA. So a model is traced on fake CPU tensors
with the operators that CUDA would choose put in (:mod:`graph_capture.cuda_attention`), and the joint graph, whose
derivatives are taken by then, is run once more on fake CUDA tensors. That gives every value the shape, dtype and
layout of CUDA's kernels by torch's own shape functions: statistics of a layer norm in float32 where the CPU has them in
bfloat16, the log-sum-exp of the attention kernel, 16 bytes of random state for 5,056.

Batch normalisation is torch's own kernel in a traced graph on CUDA as well, not cuDNN's: there is no reserve space.
`rms_norm` is taken apart as on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only

from graph_capture.cuda_attention import attention_of
from graph_capture.devices import Device
from graph_capture.errors import CaptureError
from graph_capture.joint import Joint, storage_key

CARD = torch.device("cuda", 0)


class CudaOperators(TorchFunctionMode):
    """Within this context eager code on fake CPU tensors calls what it would call on the card."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._attention = attention_of(device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Attention and dropout are replaced: the CPU keeps dropout's mask in the input's dtype, CUDA as booleans."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is torch.dropout:
            return _fused_dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _fused_dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    if not train or not 0 < p < 1 or not input.numel():
        return torch.dropout(input, p, train)
    return torch.ops.aten.native_dropout(input, p, train)[0]


def with_cuda_attention(module: fx.GraphModule, device: Device) -> None:
    """Let a Dynamo graph call the attention kernels of the card, in place."""
    replacement = attention_of(device)
    for node in module.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        node.target = replacement
    module.recompile()


def move_to_cuda(joint: Joint) -> None:
    """Replace what the nodes of a joint graph of fake CPU tensors return by fake CUDA tensors, in place.

    Raises :class:`CaptureError` with the operator that CUDA's shape functions refuse.
    """
    results: dict[fx.Node, Any] = {}
    storages: dict[int, torch.Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():

        def twin(tensor: torch.Tensor) -> torch.Tensor:
            key = storage_key(tensor)
            if key not in storages:
                storages[key] = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8, device=CARD)
            base = storages[key].view(tensor.dtype) if tensor.dtype != torch.uint8 else storages[key]
            return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        for node in joint.module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                results[node] = tree_map_only(torch.Tensor, twin, _recorded(joint, node))
            elif node.op == "call_function":
                results[node] = _run(node, results)
            else:
                continue
            node.meta["val"] = results[node]


def _recorded(joint: Joint, node: fx.Node) -> Any:
    if "val" in node.meta or node.op == "placeholder":
        return node.meta.get("val")
    found: Any = joint.module
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found


def _run(node: fx.Node, results: dict[fx.Node, Any]) -> Any:
    def moved(value: Any) -> Any:
        return CARD if isinstance(value, torch.device) and value.type == "cpu" else value

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: results[n])
    args, kwargs = tree_map(moved, (args, kwargs))
    assert callable(node.target)
    try:
        return node.target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CaptureError(
            f"operator {node.target} of the graph captured on the CPU does not run on CUDA tensors: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Plan on the card itself, with the "
            "model's parameters on it."
        ) from error
