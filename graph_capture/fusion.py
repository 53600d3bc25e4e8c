"""Which operators Inductor runs inside of the kernels of others: their results never lie in memory.

Inductor generates one kernel for neighbouring pointwise operators and reductions, and a pointwise operator is computed
anew in each kernel that reads it, as long as that is cheap. In a joint graph this is known before there is a schedule
for a pointwise operator whose readers are all generated, in two cases:

- what it reads is no larger than what it makes: whoever kept its result could as well keep what it reads;
- it has one reader, in the same phase, and nothing else runs between the two.

Such a node is *inlined*: it is no operator and makes no value, its readers read in its place what it reads, in the
forward and in the backward phase. The schedule decides everything else. What a generated kernel costs is the traffic
that is left (:meth:`Fusion.traffic_of`). An operator of another kind (matrix product, convolution, attention, random
numbers, scatter) reads and writes memory.

Written for torch 2.11 to 2.13: the list of what fuses is PyTorch's own, that of its min-cut partitioner.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
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
        aten.native_layer_norm,
        aten.native_layer_norm_backward,
        aten.native_group_norm,
        aten.native_group_norm_backward,
        aten.slice_backward,
        aten.select_backward,
        aten.upsample_nearest2d,
        aten.upsample_bilinear2d,
    }
)
"""Operators that Inductor decomposes into pointwise ones and reductions; what is taken apart before is none of them."""
_SOFTMAX = frozenset({aten._softmax, aten._softmax_backward_data})


MOST_OPERATORS = 30
"""Inductor computes no longer chain in passing (its `realize_opcount_threshold`)."""
SLACK = 1 / 16
"""How much more than its result an operator may read and still be inlined, as a fraction: rows of statistics."""


@dataclass(frozen=True)
class Fusion:
    """What is fused in one joint graph whatever the schedule; nothing, if it was made by no compiler.

    **Fields:**

    - `inlined`: each inlined node, and each view of one, with what its readers read in its place.
    - `generated`: the nodes that are parts of generated kernels, inlined or not.
    """

    inlined: Mapping[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    generated: frozenset[fx.Node] = frozenset()

    def sources(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """What a node reads from memory, once each: its arguments, an inlined one's sources in its place."""
        return _sources(node, self.inlined)

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
    finder = _Finder(generated, written)
    for nodes in phases:
        finder.inline_small_reads(nodes)
    for nodes in phases:
        finder.inline_next_to_reader(nodes)
    inlined: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for nodes in phases:
        for node in nodes:
            if node in finder.lengths:
                inlined[node] = _sources(node, inlined)
    return Fusion(inlined, generated)


class _Finder:
    """Decides what is inlined, in two passes."""

    def __init__(self, generated: frozenset[fx.Node], written: Collection[int]) -> None:
        self.generated, self.written = generated, written
        self.sources: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.lengths: dict[fx.Node, int] = {}  # inlined node, or view of one -> operators computed in passing

    def inline_small_reads(self, nodes: Sequence[fx.Node]) -> None:
        """Inline what reads no more than it makes, into each of its readers."""
        for node in nodes:
            if not self._may_be_inlined(node):
                continue
            sources = _sources(node, self.sources)
            if self._length(node) <= MOST_OPERATORS and _held_bytes(sources) <= (1 + SLACK) * _bytes(node):
                self._inline(node, sources)

    def inline_next_to_reader(self, nodes: Sequence[fx.Node]) -> None:
        """Inline what one operator reads, itself or in passing, before anything else runs; the last ones first."""
        position = {node: i for i, node in enumerate(nodes)}
        for node in reversed(nodes):
            if node in self.lengths or not self._may_be_inlined(node):
                continue
            readers = self._operators_that_read(node)
            reader = next(iter(readers))
            if len(readers) > 1 or reader not in position:
                continue
            between = nodes[position[node] + 1 : position[reader]]
            if self._length(node) < MOST_OPERATORS and all(_is_view(n) or n in self.lengths for n in between):
                self._inline(node, _sources(node, self.sources))

    def _may_be_inlined(self, node: fx.Node) -> bool:
        if not _is_pointwise(node):
            return False
        readers = _consumers(node)
        reads_written = any(storage_key(t) in self.written for i in node.all_input_nodes for t in tensors_of(i))
        return bool(readers) and not reads_written and self.generated.issuperset(readers)

    def _operators_that_read(self, node: fx.Node) -> set[fx.Node]:
        """Who reads a node, in the place of an inlined reader who reads that."""
        found: set[fx.Node] = set()
        for reader in _consumers(node):
            found |= self._operators_that_read(reader) if reader in self.lengths else {reader}
        return found

    def _length(self, node: fx.Node) -> int:
        return 1 + sum(self.lengths.get(i, 0) for i in node.all_input_nodes)

    def _inline(self, node: fx.Node, sources: tuple[fx.Node, ...]) -> None:
        length = self._length(node)
        for one in (node, *_views(node)):
            self.sources[one], self.lengths[one] = sources, length


def _sources(node: fx.Node, inlined: Mapping[fx.Node, tuple[fx.Node, ...]]) -> tuple[fx.Node, ...]:
    found: dict[fx.Node, None] = {}
    for argument in node.all_input_nodes:
        found.update(dict.fromkeys(inlined.get(argument, (argument,))))
    return tuple(found)


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


def _results(node: fx.Node) -> list[fx.Node]:
    """The node, or the pieces of its result."""
    pieces = [u for u in node.users if not isinstance(u.target, torch._ops.OpOverload) and u.op == "call_function"]
    return pieces or [node]


def _views(node: fx.Node) -> list[fx.Node]:
    """The views of a node, and those of its views."""
    return [v for user in node.users if _is_view(user) for v in (user, *_views(user))]


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


def _held_bytes(sources: Iterable[fx.Node]) -> int:
    """Bytes of the storages that a node keeps in memory by reading them; parameters and inputs are there anyway."""
    made = (s for s in sources if s.op == "call_function")
    storages = {storage_key(t): t.untyped_storage().nbytes() for s in made for t in tensors_of(s)}
    return sum(storages.values())
