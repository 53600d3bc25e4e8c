"""Where the loss of a training step comes from, and what the caller computes between forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput, PlainAOTInput, PlainAOTOutput
from torch._prims_common import suggest_memory_format
from torch.utils._pytree import tree_leaves

from graph_capture.build import Binding
from graph_capture.errors import CaptureError
from graph_capture.graph import Graph, Operator, Value
from graph_capture.joint import Joint, tangent_descriptions
from graph_capture.workspace import WorkspaceModel

aten = torch.ops.aten

LossLocation = Literal["inside the model", "loss_fn", "outside the budget"]


@dataclass(frozen=True)
class LossChoice:
    """Which graph outputs the loss comes from.

    **Fields:**

    - `location`: where it is computed. `outputs`: indices of the graph's outputs.
    - `note`: what the user should know of it.
    """

    location: LossLocation
    outputs: tuple[int, ...]
    note: str = ""


def choose_loss(result: Any, outputs: Sequence[Any], differentiable: Sequence[int]) -> LossChoice:
    """Find the loss in a model's result, without a `loss_fn`.

    A result that is a scalar, has a scalar `loss` (attribute or key), or has exactly one scalar that requires a
    gradient, carries its loss. Otherwise the loss is the caller's and outside of the budget.
    """
    position = {id(output): index for index, output in enumerate(outputs)}
    named = getattr(result, "loss", None) if not isinstance(result, dict) else result.get("loss")
    scalars = [i for i in differentiable if outputs[i].dim() == 0]
    if isinstance(named, torch.Tensor) and id(named) in position and named.dim() == 0:
        return LossChoice("inside the model", (position[id(named)],))
    if len(scalars) == 1:
        return LossChoice("inside the model", (scalars[0],))
    note = (
        "the loss is computed outside of the model and is not in the budget: what it keeps between forward and "
        "backward comes on top. Pass loss_fn=... to include it."
    )
    return LossChoice("outside the budget", tuple(differentiable), note)


def outputs_of_loss(loss_inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[int, ...]:
    """Indices of the model's outputs that a captured `loss_fn` reads and that require a gradient."""
    read = {id(value) for value in loss_inputs}
    return tuple(i for i, o in enumerate(outputs) if id(o) in read and isinstance(o, torch.Tensor) and o.requires_grad)


def tensors_of_tangents(joint: Joint, outputs: Sequence[Any], inputs: Sequence[Any]) -> list[torch.Tensor]:
    """For each tangent of a model's graph the tensor that the loss sees: an output, or an input that was written to."""
    found = []
    for described in tangent_descriptions(joint):
        if isinstance(described, PlainAOTOutput):
            found.append(outputs[described.idx])
        elif isinstance(described, InputMutationAOTOutput) and isinstance(described.mutated_input, PlainAOTInput):
            found.append(inputs[described.mutated_input.idx - 1])  # input 0 is the token
        else:
            raise CaptureError(
                f"the gradient of {described.expr()} enters the model's backward: it is no output of the model and no "
                "input. Return copies (.clone()) of tensors that share their memory."
            )
    return found


def insert_loss(
    graph: Graph,
    loss: Graph,
    loss_binding: Binding,
    gradient_of: Sequence[int | None],
    outputs: Sequence[torch.Tensor],
    workspace: WorkspaceModel,
) -> Graph:
    """Put the operators of a captured loss in the place of the graph's single loss operator.

    **Arguments:**

    - `graph`: of the model, with one operator of phase `"loss"` that makes the tangents.
    - `loss`, `loss_binding`: of the loss alone; its forward and backward both become phase `"loss"`.
    - `gradient_of`: for each tangent the primal of the loss graph whose gradient it is; `None` if there is none.
    - `outputs`: for each tangent the tensor that it belongs to (:func:`tensors_of_tangents`), whose memory format it
      must have: AOTAutograd copies a gradient that comes in another one, for instance the expanded scalar that is the
      gradient of a sum.
    - `workspace`: of these copies.
    """
    at = next(i for i, o in enumerate(graph.operators) if o.phase == "loss")
    tangents = graph.operators[at].outputs
    n_loss = len(loss.operators)
    shift = len(graph.values)
    gradients = [loss_binding.joint.gradients[p] if p is not None else None for p in gradient_of]
    made_by, copied, scratch_bytes = _arrivals(tangents, gradients, outputs, loss_binding, shift, workspace)
    rest = tuple(t for t in tangents if t not in made_by)  # tangents that autograd makes itself, as zeros or copies
    extra = 1 if rest else 0

    held_until = _held_by_formulas(loss, loss_binding)

    def move(operator: int) -> int:
        return operator if operator < at else operator + n_loss - 1 + extra

    operators = list(graph.operators[:at])
    for index, operator in enumerate(loss.operators):
        held = held_until.get(index)
        operators.append(_as_loss(dataclasses.replace(operator, inputs=held) if held else operator, shift))
    if rest:
        copies = dataclasses.replace(graph.operators[at], inputs=tuple(copied), outputs=rest)
        operators.append(dataclasses.replace(copies, workspace_bytes=copies.workspace_bytes + scratch_bytes))
    for operator in graph.operators[at + 1 :]:
        inputs = tuple(dict.fromkeys(made_by.get(v, v) for v in operator.inputs))
        operators.append(dataclasses.replace(operator, inputs=inputs))
    values = [_moved(v, move(v.producer), move) for v in graph.values]
    for value in loss.values:
        kind = "output" if value.kind == "output" else "activation"
        values.append(Value(value.size_bytes, value.producer + at, kind, shape=value.shape, dtype=value.dtype))
    kept = [i for i in range(len(values)) if i not in made_by]
    return _compact(graph, operators, values, kept, at + n_loss if rest else None)


def _arrivals(
    tangents: Sequence[int],
    gradients: Sequence[Any],
    outputs: Sequence[torch.Tensor],
    binding: Binding,
    shift: int,
    workspace: WorkspaceModel,
) -> tuple[dict[int, int], dict[int, None], int]:
    """Tangents to the loss's values that they are, the values that are copied into others, and scratch of the copies.

    `gradients` are nodes of the loss graph, whose values get `shift` added to their numbers.
    """
    made_by: dict[int, int] = {}
    copied: dict[int, None] = {}
    scratch_bytes = 0
    for tangent, gradient, output in zip(tangents, gradients, outputs, strict=True):
        values = binding.value_of.get(gradient, ()) if gradient is not None else ()
        arrives = gradient.meta["val"] if gradient is not None else None
        if arrives is not None and not _has_format_of(arrives, output):
            copied.update(dict.fromkeys(v + shift for v in values))
            memory_format = suggest_memory_format(output)
            copy = workspace.footprint(aten.clone.default, (arrives,), {"memory_format": memory_format}, output)
            scratch_bytes = max(scratch_bytes, copy.scratch)
        elif len(values) == 1 and values[0] + shift not in made_by.values():
            made_by[tangent] = values[0] + shift
    return made_by, copied, scratch_bytes


def _held_by_formulas(loss: Graph, binding: Binding) -> dict[int, tuple[int, ...]]:
    """Last backward operator of each of autograd's formulas -> everything that the formula reads and makes.

    The caller's backward is eager: one node of autograd after the other, each of which holds what it was given, what
    it had saved and its temporaries until it is done, where a graph could let go of them between its operators.
    """
    formulas: dict[int, list[int]] = {}
    for index, operator in enumerate(loss.operators):
        node = binding.nodes[index]
        if node is None or operator.phase != "backward":
            continue
        if "is_gradient_acc" not in node.meta and "seq_nr" in node.meta:
            formulas.setdefault(node.meta["seq_nr"], []).append(index)
    held: dict[int, tuple[int, ...]] = {}
    for indices in formulas.values():
        touched = dict.fromkeys(v for i in indices for v in (*loss.operators[i].inputs, *loss.operators[i].outputs))
        mine = set(loss.operators[indices[-1]].outputs)
        held[indices[-1]] = tuple(v for v in touched if v not in mine)
    return held


def _has_format_of(gradient: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether a gradient is taken as it is: AOTAutograd asks for the memory format of the output."""
    memory_format = suggest_memory_format(output)
    if output.is_contiguous(memory_format=memory_format):
        return gradient.is_contiguous(memory_format=memory_format)
    return gradient.stride() == output.stride()


def _as_loss(operator: Operator, shift: int) -> Operator:
    return dataclasses.replace(
        operator,
        name=f"loss/{operator.name}",
        phase="loss",
        inputs=tuple(v + shift for v in operator.inputs),
        outputs=tuple(v + shift for v in operator.outputs),
        recomputable=False,
        keep_reason="computed by the caller",
        random_state_bytes=0,
        in_place=(),
    )


def _moved(value: Value, producer: int, move: Callable[[int], int]) -> Value:
    after = None if value.delivered_after is None else move(value.delivered_after)
    return dataclasses.replace(value, producer=producer, delivered_after=after)


def _compact(
    graph: Graph, operators: list[Operator], values: list[Value], kept: list[int], rest_at: int | None
) -> Graph:
    """Renumber the values after the tangents that the loss makes itself were taken out."""
    number = {old: new for new, old in enumerate(kept)}
    renumbered = [
        dataclasses.replace(
            o,
            inputs=tuple(number[v] for v in o.inputs),
            outputs=tuple(number[v] for v in o.outputs),
            in_place=tuple((number[a], number[b]) for a, b in o.in_place if a in number),
        )
        for o in operators
    ]
    moved = [values[old] for old in kept]
    if rest_at is not None:
        outputs = set(renumbered[rest_at].outputs)
        moved = [dataclasses.replace(v, producer=rest_at) if i in outputs else v for i, v in enumerate(moved)]
    return dataclasses.replace(graph, operators=tuple(renumbered), values=tuple(moved))


def check_scalar(loss: Any) -> None:
    """A `loss_fn` must return one scalar tensor that depends on the model's output."""
    leaves = [t for t in tree_leaves(loss) if isinstance(t, torch.Tensor)]
    if len(leaves) != 1 or leaves[0].dim() != 0:
        raise CaptureError(
            f"loss_fn must return one scalar tensor, it returned {type(loss).__name__} with {len(leaves)} tensors of "
            f"shapes {[tuple(t.shape) for t in leaves]}; reduce it with .mean() or .sum()"
        )
