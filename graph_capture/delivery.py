"""When each gradient is handed over.

The rewritten model's backward runs in slices: as soon as a slice is done, its gradients are handed to autograd, which
adds them to ``.grad``, runs hooks and lets DDP send them, as in eager. A slice ends where a gradient is complete;
gradients that one autograd node of the original model makes together are handed over together. Small ones (a
normalisation's scale, a bias) wait until the next larger one is made: each program has a price, and kernels cannot be
fused across. Such slices end together: the program of the first one makes all, and then they are handed over in turn,
a few in one step where autograd keeps their order.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch._prims_common import is_non_overlapping_and_dense_or_false

from graph_capture.joint import Joint, storage_key, tensors_of, written_storages

WAITING_SHARE, WAITING_BYTES = 1 / 32, 2**20
"""Gradients that are complete wait for the next ones while they are at most this share of all gradients' bytes, and at
most so many bytes: too few to make a bucket of DDP late."""

AT_ONCE = 2 if sys.platform == "darwin" else 3
"""So many gradients that one autograd node returns are accumulated in the order in which it returns them: they wait in
a heap of the C++ library, whose order among more equals depends on who wrote the library. The last node returns one
more, the token's. A node of the token chain costs some 20 microseconds of Python, twice that where the data of a
training step has displaced it from the caches."""


@dataclass(frozen=True)
class Delivery:
    """When each gradient is handed over.

    **Fields:**

    - `slice_ends`: operator indices after which gradients are handed over, increasing, or equal where they waited for
      each other. Slice 0 belongs to AOTAutograd's own node, the others to the token chain.
    - `slice_of`: for each primal with a gradient the index of its slice; slice 0 is the first. Slices, and within a
      slice the primals, stand in the order in which eager would accumulate their gradients.
    - `complete_at`: operators after which gradients are complete, increasing: where slices would end if none waited.
    - `undetachable`: primals that are written to or returned: their gradients come back through AOTAutograd's node.
    - `of_value`: for each value that is a gradient (operator after which it is delivered, bytes that autograd copies).
    - `gradient_bytes`: size of all `.grad` tensors together.
    """

    slice_ends: tuple[int, ...]
    slice_of: Mapping[int, int]
    complete_at: tuple[int, ...]
    undetachable: frozenset[int]
    of_value: Mapping[int, tuple[int, int]]
    gradient_bytes: int


def plan_delivery(
    joint: Joint, value_of: Mapping[fx.Node, tuple[int, ...]], producer: Sequence[int], phases: Sequence[str]
) -> Delivery:
    """Decide the slices of the backward; `producer` and `phases` are by value and by operator."""
    complete: dict[int, int] = {}
    for primal, gradient in enumerate(joint.gradients):
        if isinstance(gradient, fx.Node):
            complete[primal] = max((producer[v] for v in value_of.get(gradient, ())), default=-1)
    first_backward = next((i for i, p in enumerate(phases) if p == "backward"), len(phases) - 1)
    complete = {p: max(c, first_backward) for p, c in complete.items()}
    undetachable = _undetachable(joint) & complete.keys()
    floor = max((complete[p] for p in undetachable), default=-1)
    last_of_node = _last_of_autograd_node(joint, complete)
    # Without undetachable primals slice 0 is empty and ends with the loss: what AOTAutograd's node returns comes in
    # the order of its inputs, what the chain's nodes return in the order that is chosen here.
    empty = [] if undetachable else [first_backward - 1]
    size_of = {p: _bytes(tensors_of(joint.primals[p])[0]) for p in complete}
    made = {p: max(last_of_node[p], floor) for p in complete}
    end_of = _wait_for_larger(made, size_of, floor)
    number, handed_over = _few_at_once(made, end_of, first=len(empty))
    ends = empty + handed_over
    ordered = sorted(complete, key=lambda p: (made[p], _passes_another_node(joint.gradients[p]), p))
    slice_of = {p: number[made[p]] for p in ordered}
    of_value: dict[int, tuple[int, int]] = {}
    seen: set[fx.Node] = set()
    for primal in complete:
        gradient = joint.gradients[primal]
        tensor, variable = tensors_of(gradient)[0], tensors_of(joint.primals[primal])[0]
        stolen = _obeys_layout_contract(tensor, variable) and gradient not in seen
        seen.add(gradient)
        copy = 0 if stolen else size_of[primal]
        for value in value_of.get(gradient, ()):
            if phases[producer[value]] == "backward":
                end, copied = of_value.get(value, (-1, 0))
                of_value[value] = (max(end, ends[slice_of[primal]]), copied + copy)
    return Delivery(tuple(ends), slice_of, tuple(number), frozenset(undetachable), of_value, sum(size_of.values()))


def _wait_for_larger(made: Mapping[int, int], size_of: Mapping[int, int], floor: int) -> dict[int, int]:
    """For each operator after which gradients are complete, the one after which they are handed over.

    What is complete by `floor` goes through AOTAutograd's node, and waits for nothing. `made` and `size_of`: by primal.
    """
    most = min(WAITING_BYTES, WAITING_SHARE * sum(size_of.values()))
    end_of: dict[int, int] = {}
    waiting: list[int] = []
    waiting_bytes = 0
    for end in sorted(set(made.values())):
        waiting.append(end)
        waiting_bytes += sum(size_of[p] for p in made if made[p] == end)
        if end == floor or waiting_bytes > most:
            end_of |= dict.fromkeys(waiting, end)
            waiting, waiting_bytes = [], 0
    return end_of | dict.fromkeys(waiting, waiting[-1] if waiting else -1)


def _few_at_once(made: Mapping[int, int], end_of: Mapping[int, int], *, first: int) -> tuple[dict[int, int], list[int]]:
    """For each operator after which gradients are complete the number of its slice, from `first`; where slices end."""
    count = Counter(made.values())
    number: dict[int, int] = {}
    ends: list[int] = []
    held, last = 0, max(count, default=-1)
    for complete in sorted(count):
        most = AT_ONCE - (complete == last)
        if not ends or ends[-1] != end_of[complete] or held + count[complete] > most:
            ends.append(end_of[complete])
            held = 0
        number[complete] = first + len(ends) - 1
        held += count[complete]
    return number, ends


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _last_of_autograd_node(joint: Joint, complete: Mapping[int, int]) -> dict[int, int]:
    """For each primal the last completion among the gradients of the same node of the original autograd graph."""
    node_of = {p: _sequence_number(joint.gradients[p]) for p in complete}
    ordered = sorted(complete, key=lambda p: complete[p])
    last: dict[int, int] = {}
    for position in range(len(ordered) - 1, -1, -1):
        primal = ordered[position]
        last[primal] = complete[primal]
        if position + 1 < len(ordered):
            following = ordered[position + 1]
            number = node_of[primal]
            if number is not None and number == node_of[following]:
                last[primal] = last[following]
    return last


def _passes_another_node(gradient: fx.Node) -> bool:
    """Whether a gradient goes through a further autograd node (a transpose, say) after the one that makes it.

    Autograd accumulates what reaches its parameter directly before it runs any other node, so within one slice such a
    gradient comes later.
    """
    return gradient.meta.get("seq_nr") != _maker(gradient).meta.get("seq_nr")


def _sequence_number(gradient: fx.Node) -> int | None:
    """Autograd's sequence number of the node whose formula made a gradient, views of it left aside."""
    return _maker(gradient).meta.get("seq_nr")


def _maker(gradient: fx.Node) -> fx.Node:
    """The node that makes the storage of a gradient."""
    node = gradient
    while len(node.all_input_nodes) == 1 and node.op == "call_function":
        source = node.all_input_nodes[0]
        if not tensors_of(source) or not tensors_of(node):
            break
        if storage_key(tensors_of(source)[0]) != storage_key(tensors_of(node)[0]):
            break
        node = source
    return node


def _undetachable(joint: Joint) -> set[int]:
    """Primals that autograd must see as they are: written to, or sharing their storage with an output."""
    returned = {storage_key(t) for n in joint.forward_outputs if isinstance(n, fx.Node) for t in tensors_of(n)}
    written = written_storages(joint.module.graph)
    keys = [{storage_key(t) for t in tensors_of(p)} for p in joint.primals]
    return {index for index, key in enumerate(keys) if key & (returned | written)}


def _obeys_layout_contract(gradient: torch.Tensor, variable: torch.Tensor) -> bool:
    """Whether autograd takes a gradient over as it is (torch/csrc/autograd/utils/grad_layout_contract.h)."""
    if is_non_overlapping_and_dense_or_false(variable):
        pairs = zip(variable.shape, gradient.stride(), variable.stride(), strict=True)
        return all(size == 1 or mine == theirs for size, mine, theirs in pairs)
    return gradient.is_contiguous()
