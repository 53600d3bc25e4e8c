"""Which operators of a functional graph may write their result into an input that nobody needs any more.

Functionalisation turns ``relu_(x)`` into ``relu(x)``; without a way back, the rewritten model would need more memory
than eager. Any pointwise operator with an in-place form qualifies when the input fills its storage and the output
looks exactly like it. In-place pointwise kernels compute the same bits as their functional forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graph_capture.joint import UNCERTAIN_LAYOUT, is_random, lazy_bits, storage_key, tensors_of

COMMUTATIVE = ("aten::add.Tensor", "aten::mul.Tensor")


@dataclass(frozen=True)
class InPlaceForm:
    """One way to run an operator in place.

    **Fields:**

    - `argument`: the node whose storage receives the result.
    - `overload`: the in-place operator, `None` for a generated kernel.
    - `swapped`: whether its first two arguments change places.
    """

    argument: fx.Node
    overload: Any
    swapped: bool


def in_place_forms(node: fx.Node) -> list[InPlaceForm]:
    """The in-place forms of an operator of a functional graph; empty if there is none."""
    overload = _in_place_overload(node)
    outputs = tensors_of(node)
    if overload is None or len(outputs) != 1:
        return []
    forms = []
    if node.args and _fits(node, node.args[0], outputs[0]):
        forms.append(InPlaceForm(node.args[0], overload, False))  # type: ignore[arg-type]
    name = node.target.name()  # type: ignore[union-attr]
    swappable = name in COMMUTATIVE and node.kwargs.get("alpha", 1) == 1
    # A complex product rounds otherwise when its factors change places: its kernels fuse multiplication and addition.
    swappable = swappable and not (name == "aten::mul.Tensor" and outputs[0].is_complex())
    pair = len(node.args) == 2 and isinstance(node.args[0], fx.Node) and node.args[1] is not node.args[0]
    if swappable and pair and _fits(node, node.args[1], outputs[0]):
        forms.append(InPlaceForm(node.args[1], overload, True))  # type: ignore[arg-type]
    return forms


def forms_of_kernel(node: fx.Node) -> list[InPlaceForm]:
    """The same for a kernel that a compiler generates for a pointwise operator: it has no overload.

    Inductor lets a kernel write over what it reads element by element, if nobody else reads it any more.
    """
    (output,) = tensors_of(node)
    return [InPlaceForm(i, None, False) for i in node.all_input_nodes if _fits(node, i, output)]


def _in_place_overload(node: fx.Node) -> Any:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or is_random(node):
        return None
    if torch.Tag.pointwise not in target.tags or target._schema.is_mutable:
        return None
    packet = getattr(torch.ops.aten, target._schema.name.split("::")[1] + "_", None)
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    if overload is None or len(overload._schema.arguments) != len(target._schema.arguments):
        return None
    first = overload._schema.arguments[0]
    return overload if first.alias_info is not None and first.alias_info.is_write else None


def _fits(node: fx.Node, argument: Any, output: torch.Tensor) -> bool:
    """Whether `argument` fills its storage, looks like `output`, and shares its storage with no other argument."""
    if not isinstance(argument, fx.Node) or argument.op != "call_function" or argument.meta.get(UNCERTAIN_LAYOUT):
        return False
    tensors = tensors_of(argument)
    if len(tensors) != 1:
        return False
    tensor = tensors[0]
    alike = tensor.dtype == output.dtype and tensor.shape == output.shape and tensor.stride() == output.stride()
    alike = alike and lazy_bits(tensor) == lazy_bits(output)
    full = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() > 0
    output_full = output.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
    key = storage_key(tensor)
    others = [i for i in node.all_input_nodes if i is not argument]
    alone = all(storage_key(t) != key for other in others for t in tensors_of(other))
    repeated = sum(a is argument for a in (*node.args, *node.kwargs.values())) > 1
    return alike and full and output_full and alone and not repeated
