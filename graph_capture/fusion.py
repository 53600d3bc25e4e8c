"""Which operators Inductor runs inside of the kernels of others: their results never lie in memory.

Inductor generates one kernel for neighbouring pointwise operators and reductions. In a joint graph that is known
before there is a schedule wherever a pointwise result has one reader, itself a part of a generated kernel, in the same
phase: whenever the reader runs, it computes that result in passing. Such a node is *inlined*: it is no operator and
makes no value, its reader reads in its place what it reads. The schedule may still decide everything else.

A reader far away would need the inlined node's inputs that long. So a node is inlined only if nothing else runs
between the two, or if its inputs are no larger than its result. What a generated kernel costs is the traffic that is
left (:meth:`Fusion.traffic_of`).

An operator of another kind (matrix product, convolution, attention, random numbers, scatter) reads and writes memory.

Written for torch 2.11 to 2.13: the list of what fuses is PyTorch's own, that of its min-cut partitioner.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import fx
from torch._functorch.partitioners import get_default_op_list

from graph_capture.flops import flops_of
from graph_capture.joint import is_mutation, is_random, storage_key, tensors_of

Compiler = Literal["eager", "inductor"]
"""Whose kernels run a step: PyTorch's own one by one, or those that Inductor generates."""

aten = torch.ops.aten
DECOMPOSED = frozenset(
    {
        aten._softmax,
        aten._softmax_backward_data,
        aten._log_softmax,
        aten._log_softmax_backward_data,
        aten.native_layer_norm,
        aten.native_layer_norm_backward,
        aten.native_group_norm,
        aten.native_group_norm_backward,
        aten._native_batch_norm_legit_functional,
        aten.native_batch_norm_backward,
        aten.nll_loss_forward,
        aten.nll_loss_backward,
        aten.slice_backward,
        aten.select_backward,
        aten.upsample_nearest2d,
        aten.upsample_bilinear2d,
    }
)
"""Operators that Inductor decomposes into pointwise ones and reductions, beside those that fuse as they are."""
_SOFTMAX = frozenset({aten._softmax, aten._softmax_backward_data, aten._log_softmax, aten._log_softmax_backward_data})


@dataclass(frozen=True)
class Fusion:
    """What is fused in one joint graph whatever the schedule; nothing, if it was made by no compiler.

    **Fields:**

    - `readers`: each inlined node, and each view of one, with the node that computes it in passing.
    - `generated`: the nodes that are parts of generated kernels, inlined or not.
    """

    readers: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    generated: frozenset[fx.Node] = frozenset()

    def sources(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """What a node reads from memory, once each: its arguments, an inlined one's arguments in its place."""
        found: dict[fx.Node, None] = {}
        for argument in node.all_input_nodes:
            found.update(dict.fromkeys(self.sources(argument) if argument in self.readers else (argument,)))
        return tuple(found)

    def may_be_written_over(self, maker: fx.Node) -> bool:
        """Whether a kernel may write its result over the one that a node makes: not over what is scattered into."""
        return maker in self.generated or (bool(flops_of(maker)) and len(tensors_of(maker)) == 1)

    def traffic_of(self, node: fx.Node) -> tuple[int, int]:
        """Bytes that a generated operator reads and writes, and how many launches it adds (0 or 1).

        It reads its sources. It writes what an operator that is not generated reads, and what the step returns: the
        rest is read in the kernel that makes it, also when it is made again for the backward pass.
        """
        moved = sum(_bytes_read(t) for source in self.sources(node) for t in tensors_of(source))
        written = [n for n in _results(node) if not all(u in self.generated for u in _consumers(n))]
        moved += sum(_bytes_read(t) for n in written for t in tensors_of(n))
        return moved, int(bool(written))


def find_fusion(
    phases: Sequence[Sequence[fx.Node]], written: Collection[int], compiler: Compiler = "inductor"
) -> Fusion:
    """The fusion of a joint graph.

    `phases`: the nodes of forward and backward, each in captured order. `written`: storages that the step writes into,
    whose readers stay where they are.
    """
    if compiler == "eager":
        return Fusion()
    generated = frozenset(n for nodes in phases for n in nodes if _is_generated(n))
    readers: dict[fx.Node, fx.Node] = {}
    for nodes in phases:
        position = {node: i for i, node in enumerate(nodes)}
        for node in reversed(nodes):
            path = _path_to_reader(node, generated, position) if _is_pointwise(node) else ()
            if not path or any(storage_key(t) in written for i in node.all_input_nodes for t in tensors_of(i)):
                continue
            reader = path[-1]
            between = nodes[position[node] + 1 : position[reader]]
            alone = all(_is_view(n) or readers.get(n) is reader for n in between)
            if alone or _input_bytes(Fusion(readers, generated), node) <= _bytes(node):
                readers.update(dict.fromkeys((node, *path[:-1]), reader))
    return Fusion(readers, generated)


def statistics_bytes(node: fx.Node) -> int:
    """Scratch memory of a generated operator: a softmax has a maximum, a sum and its logarithm for each row."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    if target.overloadpacket not in _SOFTMAX:
        return 0
    place = next(i for i, argument in enumerate(target._schema.arguments) if argument.name == "dim")
    (result,) = tensors_of(node)
    rows = result.numel() // max(1, result.shape[cast("int", node.args[place])] if result.dim() else 1)
    return 3 * rows * max(4, result.element_size())


def copied_bytes(node: fx.Node) -> int:
    """Scratch memory of a called operator beyond eager's: what is scattered into an embedding is masked in a copy."""
    if node.target is not aten.embedding_dense_backward.default:
        return 0
    return _bytes_read(tensors_of(node.all_input_nodes[0])[0])


def _path_to_reader(
    node: fx.Node, generated: Collection[fx.Node], position: Mapping[fx.Node, int]
) -> tuple[fx.Node, ...]:
    """The views of a node, one of the other, and the one operator that reads the last; empty if there is none."""
    path: list[fx.Node] = []
    while True:
        if len(node.users) != 1:
            return ()
        (node,) = node.users
        path.append(node)
        if node not in position:
            return ()
        if not _is_view(node):
            return tuple(path) if node in generated else ()


def _results(node: fx.Node) -> list[fx.Node]:
    """The node, or the pieces of its result."""
    pieces = [u for u in node.users if not isinstance(u.target, torch._ops.OpOverload) and u.op == "call_function"]
    return pieces or [node]


def _consumers(node: fx.Node) -> list[fx.Node]:
    """Who reads a node, through any views of it; the output node for what is returned."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _consumers(user) if _is_view(user) else [user]
    return found


@functools.cache
def _fusible() -> frozenset[Any]:
    return frozenset(get_default_op_list().fusible_ops)


def _is_generated(node: fx.Node) -> bool:
    """Whether Inductor generates a kernel for an operator, rather than calling one."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or is_random(node) or is_mutation(node) or flops_of(node):
        return False
    return torch.Tag.pointwise in target.tags or target.overloadpacket in _fusible() | DECOMPOSED


def _is_pointwise(node: fx.Node) -> bool:
    """Whether an operator makes each element of its one result, a storage of its own, from a few elements."""
    if not _is_generated(node) or _is_view(node) or len(tensors_of(node)) != 1:
        return False
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    return torch.Tag.pointwise in target.tags or target.overloadpacket in _CREATE_OR_CONVERT


_CREATE_OR_CONVERT = frozenset({aten._to_copy, aten.arange, aten.full, aten.scalar_tensor, aten.triu, aten.tril})


def _is_view(node: fx.Node) -> bool:
    """Whether a node's results all lie in storages of its inputs."""
    if node.op != "call_function" or is_mutation(node):
        return False
    given = {storage_key(t) for i in node.all_input_nodes for t in tensors_of(i)}
    made = [storage_key(t) for t in tensors_of(node)]
    return bool(made) and all(key in given for key in made)


def _bytes_read(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; an expanded one is no larger than what it lies in."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _bytes(node: fx.Node) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors_of(node))


def _input_bytes(fusion: Fusion, node: fx.Node) -> int:
    """Bytes of the storages that a node keeps in memory by reading them; parameters and inputs are there anyway."""
    made = (s for s in fusion.sources(node) if s.op == "call_function")
    storages = {storage_key(t): t.untyped_storage().nbytes() for s in made for t in tensors_of(s)}
    return sum(storages.values())
