"""Which operators Inductor runs inside of the kernels of others: their results never lie in memory.

Inductor generates one kernel for neighbouring pointwise operators and reductions, and a pointwise operator is computed
anew in each kernel that reads it, as long as that is cheap. In a joint graph this is known before there is a schedule
for a pointwise operator whose readers are all generated, in two cases:

- it reads one tensor of its own shape, the others being broadcast: whoever kept its result could as well keep that one;
- one operator reads it, in the same phase, and nothing else runs between the two.

Such a node is *inlined*: it is no operator and makes no value, its readers read in its place what it reads, in the
forward and in the backward phase. The schedule decides everything else. What a generated kernel costs is the traffic
that is left (:meth:`Fusion.traffic_of`). An operator of another kind (matrix product, convolution, attention, random
numbers, scatter) reads and writes memory.

No decision depends on the size of a batch. Two exceptions: a node of the backward phase that reads a parameter stays
where it is, before the parameter's gradient is handed over, since a hook may then change the parameter; and what is
dear to compute on a CPU (:data:`HEAVY`), or reads much, and is read again behind an operator that Inductor calls, lies
in memory there.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from graph_capture.flops import flops_of
from graph_capture.fusible import bytes_read, consumers, is_generated, is_pointwise, is_view, results, views
from graph_capture.graph import Compiler
from graph_capture.joint import storage_key, tensors_of
from graph_capture.pooling import BACKWARD

aten = torch.ops.aten
MOST_OPERATORS = 30
"""Inductor computes no longer chain in passing (its `realize_opcount_threshold`)."""

MOST_READS = 4
"""It computes nothing twice that reads more tensors (its `realize_reads_threshold`)."""

HEAVY = frozenset(
    {"exp", "log", "log10", "log1p", "log2", "sigmoid", "tanh", "elu", "gelu", "mish", "silu", "softplus"}
    | {"gelu_backward", "silu_backward"}
)
"""Nor, on a CPU, what holds one of these (its `should_realize_on_reuse`)."""


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
        generated = maker in self.generated and maker.target is not BACKWARD
        of_convolution = maker.target is aten.convolution_backward.default
        return generated or of_convolution or (bool(flops_of(maker)) and len(tensors_of(maker)) == 1)

    def traffic_of(self, node: fx.Node) -> tuple[int, int]:
        """Bytes that a generated operator reads and writes, and how many launches it adds (0 or 1).

        It reads its sources. It writes what an operator that is not generated reads, and what the step returns: the
        rest is read in the kernel that makes it, also when it is made again for the backward pass.
        """
        moved = sum(bytes_read(t) for source in self.sources(node) for t in tensors_of(source))
        written = [n for n in results(node) if not all(u in self.generated for u in consumers(n))]
        moved += sum(bytes_read(t) for n in written for t in tensors_of(n))
        return moved, int(bool(written))


def find_fusion(
    forward: Sequence[fx.Node],
    backward: Sequence[fx.Node],
    *,
    written: Collection[int] = (),
    trained: Collection[int] = (),
    compiler: Compiler = "inductor",
) -> Fusion:
    """The fusion of a joint graph.

    `forward`, `backward`: nodes in captured order. `written`: storages that the step writes into, whose readers stay
    where they are. `trained`: storages of what gets a gradient.
    """
    if compiler == "eager":
        return Fusion()
    generated = frozenset(n for n in (*forward, *backward) if is_generated(n))
    finder = Finder(generated, written)
    finder.inline_alike(forward)
    finder.inline_alike(backward, stay=trained)
    for phase in (forward, backward):
        finder.inline_next_to_reader(phase)
    finder.store_what_is_computed_twice(forward, backward)
    inlined: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in (*forward, *backward):
        if node in finder.lengths:
            inlined[node] = _sources(node, inlined)
    return Fusion(inlined, generated)


class Finder:
    """Decides what is inlined.

    **Fields:**

    - `lengths`: each inlined node, or view of one, with the number of operators that are computed in passing for it.
    - `alike`: the storages of its own shape that such a node reads, directly or through inlined ones.
    """

    def __init__(self, generated: frozenset[fx.Node], written: Collection[int]) -> None:
        self.generated, self.written = generated, written
        self.lengths: dict[fx.Node, int] = {}
        self.alike: dict[fx.Node, dict[int, int]] = {}  # storage -> bytes of one element
        self.reads: dict[fx.Node, frozenset[int]] = {}  # all storages that are read, of any shape

    def inline_alike(self, nodes: Sequence[fx.Node], stay: Collection[int] = ()) -> None:
        """Inline what reads one tensor of its own shape, and none of the storages in `stay`, into all its readers."""
        for node in nodes:
            if not self._may_be_inlined(node) or self._length(node) > MOST_OPERATORS:
                continue
            alike, (result,) = self._alike(node), tensors_of(node)
            small = all(size <= result.element_size() for size in alike.values())
            if len(alike) <= 1 and small and not self._reads(node).intersection(stay):
                self._inline(node)

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
            if self._length(node) < MOST_OPERATORS and all(is_view(n) or n in self.lengths for n in between):
                self._inline(node)

    def store_what_is_computed_twice(self, *phases: Sequence[fx.Node]) -> None:
        """Take back what Inductor would rather keep than compute again behind an operator that it calls."""
        dear: set[fx.Node] = set()
        places = [_Places(nodes, self.generated) for nodes in phases]
        for node in [n for nodes in phases for n in nodes if n in self.lengths]:
            if len(self._reads(node)) > MOST_READS or _is_heavy(node) or dear.intersection(node.all_input_nodes):
                dear.add(node)
                readers = self._operators_that_read(node)
                if any(place.apart(readers) for place in places):
                    for one in (node, *views(node)):
                        self.lengths.pop(one, None)
                    dear.discard(node)

    def is_cheap(self, node: fx.Node) -> bool:
        """Whether a node that lies in memory reads one tensor of its own shape, and may be computed anywhere."""
        if not is_pointwise(node) or self._reads_written(node) or self._length(node) > MOST_OPERATORS:
            return False
        alike, (result,) = self._alike(node), tensors_of(node)
        chain = (node, *(i for i in node.all_input_nodes if i in self.lengths))
        light = len(self._reads(node)) <= MOST_READS + 1 and not any(_is_heavy(n) for n in chain)
        return light and len(alike) == 1 and all(size <= result.element_size() for size in alike.values())

    def alike_storages(self, node: fx.Node) -> tuple[int, ...]:
        """The storages of a node's own shape that it reads."""
        return tuple(self._alike(node))

    def storages_read(self, node: fx.Node) -> frozenset[int]:
        """All storages that a node reads, those of inlined nodes in their place."""
        return self._reads(node)

    def _may_be_inlined(self, node: fx.Node) -> bool:
        readers = consumers(node) if is_pointwise(node) else []
        return bool(readers) and not self._reads_written(node) and self.generated.issuperset(readers)

    def _reads_written(self, node: fx.Node) -> bool:
        return any(storage_key(t) in self.written for i in node.all_input_nodes for t in tensors_of(i))

    def _operators_that_read(self, node: fx.Node) -> set[fx.Node]:
        """Who reads a node, in the place of an inlined reader who reads that."""
        found: set[fx.Node] = set()
        for reader in consumers(node):
            found |= self._operators_that_read(reader) if reader in self.lengths else {reader}
        return found

    def _length(self, node: fx.Node) -> int:
        return 1 + sum(self.lengths.get(i, 0) for i in node.all_input_nodes)

    def _alike(self, node: fx.Node) -> dict[int, int]:
        (result,) = tensors_of(node)
        found: dict[int, int] = {}
        for argument in node.all_input_nodes:
            for tensor in tensors_of(argument):
                if tensor.shape == result.shape and argument.op == "call_function":
                    own = {storage_key(tensor): tensor.element_size()}
                    found |= self.alike[argument] if argument in self.lengths else own
        return found

    def _reads(self, node: fx.Node) -> frozenset[int]:
        found: set[int] = set()
        for argument in node.all_input_nodes:
            own = {storage_key(t) for t in tensors_of(argument)}
            found |= self.reads[argument] if argument in self.lengths else own
        return frozenset(found)

    def _inline(self, node: fx.Node) -> None:
        length, alike, reads = self._length(node), self._alike(node), self._reads(node)
        for one in (node, *views(node)):
            self.lengths[one], self.alike[one], self.reads[one] = length, alike, reads


class _Places:
    """Where the operators of a phase stand, and those that Inductor calls."""

    def __init__(self, nodes: Sequence[fx.Node], generated: Collection[fx.Node]) -> None:
        self.position = {node: i for i, node in enumerate(nodes)}
        self.called = [i for i, n in enumerate(nodes) if n not in generated and not is_view(n) and _runs(n)]

    def apart(self, readers: Collection[fx.Node]) -> bool:
        """Whether one of the readers that are in this phase stands behind a called operator, and another before it."""
        at = [self.position[r] for r in readers if r in self.position]
        return bool(at) and bisect.bisect(self.called, min(at)) != bisect.bisect(self.called, max(at))


def _sources(node: fx.Node, inlined: Mapping[fx.Node, tuple[fx.Node, ...]]) -> tuple[fx.Node, ...]:
    found: dict[fx.Node, None] = {}
    for argument in node.all_input_nodes:
        found.update(dict.fromkeys(inlined.get(argument, (argument,))))
    return tuple(found)


def _is_heavy(node: fx.Node) -> bool:
    name = str(node.target).removeprefix("aten.").split(".")[0]
    return name in HEAVY and all(t.device.type == "cpu" for t in tensors_of(node))


def _runs(node: fx.Node) -> bool:
    """Whether a node is an operator, and no piece of one's result."""
    return isinstance(node.target, torch._ops.OpOverload)
