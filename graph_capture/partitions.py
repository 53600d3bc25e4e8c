"""What PyTorch's own partitioner would save for the backward pass of a captured step.

``torch._functorch.partitioners.min_cut_rematerialization_partition`` cuts a joint graph into forward and backward so
that cheap operators run again, and with ``activation_memory_budget`` (a ratio of the saved bytes, 0 to 1) dearer ones
too, by a knapsack over FLOPs. What crosses the cut is what it saves; nothing is run.

Written for torch 2.11 to 2.13: module and setting are private.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition

from graph_capture.build import Binding
from graph_capture.dropout_mask import DROPOUT_MASK
from graph_capture.graph import Graph

SavedOutputs = frozenset[tuple[int, int]]
"""(operator, place among its outputs) of each value that is saved. Forward operators keep their numbers whatever loss
is put behind them, values do not."""


def saved_by_pytorch(graph: Graph, binding: Binding, ratios: Iterable[float]) -> dict[float, SavedOutputs]:
    """For each `activation_memory_budget` the values that PyTorch's partitioner saves; the joint graph stays as it is.

    `graph`, `binding`: as :func:`~graph_capture.build.build_graph` returns them, before a loss is put in. Takes seconds
    for a graph of a thousand operators.
    """
    found = {ratio: _saved(binding, ratio) for ratio in ratios}
    makers = {ratio: [(graph.values[v].producer, v) for v in saved] for ratio, saved in found.items()}
    return {ratio: frozenset((o, graph.operators[o].outputs.index(v)) for o, v in m) for ratio, m in makers.items()}


def _saved(binding: Binding, ratio: float) -> set[int]:
    joint = binding.joint
    by_name = {node.name: node for node in joint.module.graph.nodes}
    twin = fx.GraphModule(joint.module, copy.deepcopy(joint.module.graph))
    with functorch_config.patch(activation_memory_budget=ratio), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own use of what it deprecates
        forward, _ = min_cut_rematerialization_partition(twin, None, num_fwd_outputs=len(joint.forward_outputs))
    (output,) = forward.graph.find_nodes(op="output")
    kept = (n for n in output.args[0][len(joint.forward_outputs) :] if isinstance(n, fx.Node) and n.name in by_name)
    saved = {value for node in kept for value in binding.value_of.get(by_name[node.name], ())}
    # A mask is read from nothing, and the partitioner would draw it again; PyTorch's own way saves it.
    masks = joint.module.graph.find_nodes(op="call_function", target=DROPOUT_MASK)
    return saved.union(*(binding.value_of[mask] for mask in masks))
