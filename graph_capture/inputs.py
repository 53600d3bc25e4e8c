"""Which inputs a model is called with, where nobody said it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from graph_capture.errors import InputsUnknownError

_HOW = (
    "Say them in one of two ways:\n"
    "  plan(model, budget, example_inputs=(x,), example_kwargs={'mask': m})   # as you call model(x, mask=m)\n"
    "  auto_checkpoint(model, budget)                                        # takes the first training step's inputs"
)


def resolve_inputs(
    model: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The module to plan, and its positional and keyword inputs.

    Known without being said are the inputs of an `ExportedProgram` (its example inputs), of an `fx.GraphModule` whose
    placeholders carry `meta["val"]`, and of a Hugging Face model (`dummy_inputs`, with labels if it takes them).
    Raises :class:`InputsUnknownError` elsewhere.
    """
    if not isinstance(args, (tuple, list)):
        raise InputsUnknownError(f"example_inputs must be a tuple of arguments, not a {type(args).__name__}. {_HOW}")
    if isinstance(model, torch.export.ExportedProgram):
        given, keyword = model.example_inputs or ((), {})
        return model.module(), tuple(args) or tuple(given), dict(kwargs or keyword)
    if not isinstance(model, nn.Module):
        raise InputsUnknownError(
            f"a torch.nn.Module or an ExportedProgram can be planned, not a {type(model).__name__}"
        )
    if args or kwargs:
        return model, tuple(args), dict(kwargs or {})
    if isinstance(model, fx.GraphModule):
        values = [node.meta.get("val") for node in model.graph.find_nodes(op="placeholder")]
        if values and all(isinstance(v, torch.Tensor) for v in values):
            return model, tuple(values), {}
    dummy = _hugging_face_inputs(model)
    if dummy is not None:
        return model, (), dummy
    raise InputsUnknownError(f"the inputs of {type(model).__name__} are not known. {_HOW}")


def _hugging_face_inputs(model: nn.Module) -> dict[str, Any] | None:
    """`dummy_inputs` of a Hugging Face model; with labels where the model computes a loss from them."""
    if not hasattr(model, "config") or not isinstance(getattr(model, "dummy_inputs", None), dict):
        return None
    dummy: Any = model.dummy_inputs
    inputs: dict[str, Any] = dict(dummy)
    causal = "ForCausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    if causal and "labels" not in inputs and isinstance(inputs.get("input_ids"), torch.Tensor):
        inputs["labels"] = inputs["input_ids"].clone()
    return inputs
