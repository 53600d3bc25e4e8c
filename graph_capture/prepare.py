"""Prepare the graph that TorchDynamo hands to a backend, the same way for planning and for running.

Three changes are made on a copy (Dynamo still owns its graph):

- a zero-dimensional *token* input is put in front. The rewritten model threads a chain of small autograd nodes
  through it, which hand the gradients over one by one; for planning it only keeps the joint graph the same.
- outputs that the loss does not come from are detached. AOTAutograd would otherwise make a tangent of zeros for each
  of them, as large as the output (for a language model, as large as its logits).
- outputs of the loss that share their memory get a gradient each.

Written for torch 2.11 to 2.13: relies on the private ``_dynamo_source`` attribute of placeholders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from graph_capture.autocast import mark_blocks
from graph_capture.joint import lazy_bits, storage_key

aten = torch.ops.aten
TOKEN_NAME = "checkpoint_token"


@dataclass(frozen=True)
class Prepared:
    """A Dynamo graph with a token input in front.

    **Fields:**

    - `module`, `example_inputs`: what AOTAutograd gets.
    - `sources`: for each example input but the token, where Dynamo found it (`L['self']._parameters['weight']`).
    - `detached_outputs`: indices of the outputs that were detached and required a gradient before.
    """

    module: fx.GraphModule
    example_inputs: tuple[Any, ...]
    sources: tuple[str, ...]
    detached_outputs: tuple[int, ...]


def output_nodes(module: fx.GraphModule) -> tuple[Any, ...]:
    """The flat outputs of a Dynamo graph."""
    return tuple(next(iter(module.graph.find_nodes(op="output"))).args[0])


def example_value(node: Any) -> Any:
    """The fake tensor that stands for a node's result; `None` for what is no tensor."""
    if not isinstance(node, fx.Node):
        return None
    return node.meta.get("example_value", node.meta.get("val"))


def differentiable_outputs(module: fx.GraphModule) -> tuple[int, ...]:
    """Indices of the outputs that require a gradient."""
    found = []
    for index, node in enumerate(output_nodes(module)):
        value = example_value(node)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            found.append(index)
    return tuple(found)


def _shared_outputs(module: fx.GraphModule, loss_outputs: Collection[int]) -> list[int]:
    """Those of `loss_outputs` that share their memory with another output or with an input."""
    outputs = output_nodes(module)
    nodes = dict.fromkeys((*module.graph.find_nodes(op="placeholder"), *(n for n in outputs if isinstance(n, fx.Node))))
    values = {node: value for node in nodes if isinstance(value := example_value(node), torch.Tensor)}
    count = Counter(storage_key(value) for value in values.values())
    return [i for i in loss_outputs if count[storage_key(values[outputs[i]])] > 1]


def _with_a_gradient_of_its_own(graph: fx.Graph, output: fx.Node, *, shared: bool) -> fx.Node:
    """An output that AOTAutograd takes for a tensor of its own, so that the backward takes its gradient.

    Of outputs that are views of one tensor, or of an input, it would take the gradient of what they are views of, and
    leave the rest to autograd, where no plan sees it. A conjugate, or negative, that is yet to be carried out would
    make it expect such a gradient.
    """
    value = example_value(output)
    if any(lazy_bits(value)):
        output = graph.call_function(torch.resolve_conj, (graph.call_function(torch.resolve_neg, (output,)),))
    elif shared:
        output = graph.call_function(aten._unsafe_view.default, (output, list(value.shape)))
    else:
        return output
    output.meta["example_value"] = value
    return output


def prepare(module: fx.GraphModule, example_inputs: Sequence[Any], loss_outputs: Collection[int]) -> Prepared:
    """Copy a Dynamo graph, add the token input, and detach the outputs that are not in `loss_outputs`.

    Those that are get a gradient each, also where they share their memory.
    """
    fake_mode = detect_fake_mode(example_inputs)
    graph = fx.Graph()
    token = graph.placeholder(TOKEN_NAME)
    token._dynamo_source = torch._dynamo.source.LocalSource(TOKEN_NAME, is_input=True)  # type: ignore[attr-defined]
    assert fake_mode is not None, "Dynamo hands fake tensors to its backends"
    with fake_mode:
        fake_token = torch.zeros((), dtype=torch.float64, requires_grad=True)
    token.meta["val"] = token.meta["example_value"] = fake_token
    copies: dict[fx.Node, fx.Node] = {}
    sources: list[str] = []
    detached: list[int] = []
    for node in module.graph.nodes:
        if node.op == "output":
            outputs = list(node.args[0])
            for index in set(differentiable_outputs(module)) - set(loss_outputs):
                # Several outputs may be one node; each place in the output list gets a detached alias of its own.
                alias = graph.call_method("detach", (copies[outputs[index]],))
                alias.meta["example_value"] = example_value(outputs[index]).detach()
                copies[alias] = alias
                outputs[index] = alias
                detached.append(index)
            outputs = [copies[o] if isinstance(o, fx.Node) else o for o in outputs]
            shared = _shared_outputs(module, loss_outputs)
            for index in loss_outputs:
                outputs[index] = _with_a_gradient_of_its_own(graph, outputs[index], shared=index in shared)
            graph.output(tuple(outputs))
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if hasattr(node, "_dynamo_source"):
            copies[node]._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
        if node.op == "placeholder":
            source = getattr(node, "_dynamo_source", None)
            sources.append(str(source.name() if callable(source.name) else source.name) if source is not None else "")
    mark_blocks(graph)
    copy = fx.GraphModule(module, graph)
    copy.meta.update(module.meta)
    return Prepared(copy, (fake_token, *example_inputs), tuple(sources), tuple(sorted(detached)))
