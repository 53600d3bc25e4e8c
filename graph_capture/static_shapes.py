"""A graph with symbolic sizes, made static again.

`torch.compile` makes a size symbolic when it changes from one call to the next. Plans are for fixed sizes: the sizes at
hand are guarded (each set of sizes is then compiled by itself) and put into the graph as numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from graph_capture.errors import CaptureError
from graph_capture.prepare import example_value

_NOT_FIXED = (
    "torch.compile made the number {} of the graph symbolic ({}). Plans are for fixed numbers: compile with "
    "dynamic=False."
)


@dataclass(frozen=True)
class StaticGraph:
    """A Dynamo graph without symbolic sizes.

    **Fields:**

    - `module`, `example_inputs`: without the inputs that were symbolic integers.
    - `kept`: the positions of the remaining inputs among the original ones.
    """

    module: fx.GraphModule
    example_inputs: tuple[Any, ...]
    kept: tuple[int, ...]


def is_symbolic(module: fx.GraphModule) -> bool:
    """Whether an input of a Dynamo graph is a symbolic number or a tensor with a symbolic size."""
    return any(_symbolic(example_value(node)) for node in module.graph.find_nodes(op="placeholder"))


def static_graph(module: fx.GraphModule, example_inputs: Sequence[Any]) -> StaticGraph:
    """Guard every symbolic size at its present value, and rebuild the graph with numbers.

    Raises :class:`CaptureError` for symbolic numbers that are no sizes (`dynamic=True` makes some of them tensors).
    """
    fake_mode = detect_fake_mode(example_inputs)
    assert fake_mode is not None, "Dynamo hands fake tensors to its backends"
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    copies: dict[fx.Node, Any] = {}
    inputs: list[Any] = []
    kept: list[int] = []
    given = iter(enumerate(example_inputs))
    with fake_mode, torch.random.fork_rng(devices=[]):
        for node in module.graph.nodes:
            if node.op == "placeholder":
                position, value = next(given)
                value = values[node] = _concrete(node, value, fake_mode)
                if isinstance(value, (int, float, bool)):
                    copies[node] = value
                    continue
                inputs.append(value)
                kept.append(position)
            elif node.op != "output":
                try:
                    values[node] = _run(module, node, values)
                except DataDependentOutputException as error:
                    raise CaptureError(_NOT_FIXED.format(node.name, "read back from a tensor")) from error
                if not _holds_tensor(values[node]):
                    copies[node] = values[node]  # a size that is computed from sizes
                    continue
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            if hasattr(node, "_dynamo_source"):
                copies[node]._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
            if node.op != "output":
                copies[node].meta = {**node.meta, "example_value": values[node]}
    static = fx.GraphModule(module, graph)
    static.meta.update(module.meta)
    return StaticGraph(static, tuple(inputs), tuple(kept))


def _run(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return module.get_submodule(str(node.target)) if _is_module(module, node) else _attribute(module, node)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module":
        return module.get_submodule(str(node.target))(*args, **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_module(module: fx.GraphModule, node: fx.Node) -> bool:
    return str(node.target) in dict(module.named_modules())


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensor, value))
    return not isinstance(value, (int, float, bool, torch.Size))


def _symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        numbers = (*value.shape, *value.stride(), value.storage_offset())
        return any(isinstance(n, torch.SymInt) for n in numbers)
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _concrete(node: fx.Node, given: Any, fake_mode: FakeTensorMode) -> Any:
    """An input with numbers for symbols; asking for a symbol's number adds a guard."""
    traced = node.meta.get("example_value", given)
    if isinstance(traced, (torch.SymInt, torch.SymBool)):
        return int(traced) if isinstance(traced, torch.SymInt) else bool(traced)
    from_number = type(getattr(node, "_dynamo_source", None)).__name__ == "FloatTensorSource"
    if from_number or not isinstance(given, torch.Tensor):
        raise CaptureError(_NOT_FIXED.format(node.name, type(given).__name__))
    for number in (*traced.shape, *traced.stride(), traced.storage_offset()):
        int(number)
    return given if isinstance(given, FakeTensor) else fake_mode.from_tensor(given, static_shapes=True)
