"""Autocast's cache, in traced graphs: a weight that is used twice is cast once.

In eager, autocast keeps the low-precision copy of a float32 parameter until its block ends, so the gradients of the
parameter's uses are added in low precision, and their sum is cast. AOTAutograd traces without that cache: it casts for
every use, and adds in float32. Both are right, but they round differently. :func:`mark_blocks` writes the autocast
block on each operator of Dynamo's graph; :func:`share_casts` then merges the casts in the joint graph, and their
gradients, into what eager does.

The cache does not outlive a call of the model: where one autocast block calls a planned model twice, eager shares the
copies between the calls, and the planned model does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from graph_capture.errors import CaptureError

aten = torch.ops.aten
BLOCK = "checkpoint_autocast_block"
CASTS_OF_THE_USER = {"to", "type", "type_as", "bfloat16", "half"}


def mark_blocks(graph: fx.Graph) -> None:
    """Write on the operators of Dynamo's graph that stand in an autocast block with a cache, which block it is, and
    which inputs of the graph that they read are kept in the cache: parameters, and other leaves that are no views.
    """
    index = {node: position for position, node in enumerate(graph.find_nodes(op="placeholder"))}
    ambient = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    caches = [torch.is_autocast_cache_enabled()]
    depth, block = int(ambient), 0
    for node in graph.nodes:
        if node.target is _enter_autocast:
            block += depth == 0  # the cache is emptied where the outermost block ends
            depth += 1
            given = node.args[3] if len(node.args) > 3 else node.kwargs.get("cache_enabled")
            caches.append(caches[-1] if given is None else bool(given))
        elif node.target is _exit_autocast:
            depth -= 1
            caches.pop()
        elif depth and caches[-1] and not (node.op == "call_method" and node.target in CASTS_OF_THE_USER):
            cached = frozenset(index[n] for n in node.all_input_nodes if n in index and _is_cached(n))
            node.meta["custom"] = {**node.meta.get("custom", {}), BLOCK: (block, cached)}


def _is_cached(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf and not value._is_view()


@dataclass(frozen=True)
class _Cast:
    """A cast of a parameter, and the cast of its gradient (`None`: the loss does not depend on this use)."""

    node: fx.Node
    gradient: fx.Node | None


def share_casts(graph: fx.Graph) -> None:
    """Merge autocast's casts of one parameter in one block, in a joint graph, and add their gradients as eager does."""
    groups = _groups(graph)
    if not groups:
        return
    output = next(iter(graph.find_nodes(op="output")))
    for (parameter, _, _), casts in groups.items():
        first, *others = (cast.node for cast in casts)
        for other in others:
            other.replace_all_uses_with(first)
            graph.erase_node(other)
        gradients = [cast.gradient for cast in casts if cast.gradient is not None]
        if len(gradients) > 1:
            _add_in_low_precision(graph, output, parameter, gradients)


def _groups(graph: fx.Graph) -> dict[tuple[fx.Node, Any, int], list[_Cast]]:
    """(parameter, dtype, block) -> the casts that eager would make once."""
    gradients = {
        node.meta.get("seq_nr"): node
        for node in graph.find_nodes(op="call_function", target=aten._to_copy.default)
        if node.meta.get("partitioner_tag") == "is_backward"
    }
    groups: dict[tuple[fx.Node, Any, int], list[_Cast]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=aten._to_copy.default):
        parameter = node.args[0]
        if not isinstance(parameter, fx.Node) or parameter.op != "placeholder" or "desc" not in parameter.meta:
            continue
        block, cached = (node.meta.get("custom") or {}).get(BLOCK, (0, ()))
        before, after = parameter.meta["val"].dtype, node.meta["val"].dtype
        backward = node.meta.get("partitioner_tag") == "is_backward"
        if backward or before is not torch.float32 or after not in (torch.bfloat16, torch.float16):
            continue
        if getattr(parameter.meta["desc"], "idx", None) in cached:
            groups[parameter, after, block].append(_Cast(node, gradients.get(node.meta.get("seq_nr"))))
    return {key: casts for key, casts in groups.items() if len(casts) > 1}


def _add_in_low_precision(graph: fx.Graph, output: fx.Node, parameter: fx.Node, gradients: Sequence[fx.Node]) -> None:
    """Replace the sum of a parameter's gradients by one in which those of `gradients` are added before their cast."""
    total, terms = _sum_with(output, gradients)
    if total is None:
        raise CaptureError(
            f"{parameter.name} is used more than once under autocast, and its gradients are not added in a way that "
            "can be followed; use autocast(..., cache_enabled=False)"
        )
    position = {node: index for index, node in enumerate(graph.nodes)}
    low: fx.Node | None = None
    high: fx.Node | None = None
    remaining = len(gradients)
    for term in terms:
        if term not in gradients:
            high = _sum(graph, high, term, position)
            continue
        source = term.args[0]
        assert isinstance(source, fx.Node)
        low = _sum(graph, low, source, position)
        remaining -= 1
        if remaining == 0:  # in eager the cast of the sum has the place of the first use, the last in the backward
            anchor = max(low, term, key=position.__getitem__)
            with graph.inserting_after(anchor):
                cast = graph.node_copy(term, lambda _, low=low: low)
            position[cast] = position[anchor]
            high = _sum(graph, high, cast, position)
    assert high is not None
    total.replace_all_uses_with(high)


def _sum_with(output: fx.Node, gradients: Sequence[fx.Node]) -> tuple[fx.Node | None, list[fx.Node]]:
    """The output that is a sum of terms, `gradients` among them, and its terms in the order of their addition."""
    wanted = set(gradients)
    for total in output.all_input_nodes:
        terms: list[fx.Node] = []
        node = total
        while node not in wanted and node.target is aten.add.Tensor and not node.kwargs:
            left, right = node.args
            if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
                break
            terms.append(right)
            node = left
        terms.append(node)
        if wanted <= set(terms):
            return total, terms[::-1]
    return None, []


def _sum(graph: fx.Graph, before: fx.Node | None, term: fx.Node, position: dict[fx.Node, int]) -> fx.Node:
    """before + term, as soon as both are there."""
    if before is None:
        return term
    anchor = max(before, term, key=position.__getitem__)
    with graph.inserting_after(anchor):
        added = graph.call_function(aten.add.Tensor, (before, term))
    added.meta = {k: v for k, v in term.meta.items() if k not in ("val", "tensor_meta", "original_aten")}
    added.meta["val"] = torch.add(before.meta["val"], term.meta["val"])
    position[added] = position[anchor]
    return added
