"""Activation checkpointing that a model has of its own and that is switched on: a plan takes its place."""

from __future__ import annotations

from torch import nn

from planner.errors import RewriteError

SWITCHES = ("gradient_checkpointing", "activation_checkpointing", "grad_checkpointing", "use_checkpoint")
"""The attributes by which `transformers` and `diffusers`, their successors, `timm`, and others say that it is on."""


def refuse_checkpointing(model: nn.Module) -> None:
    """Raise :class:`~planner.errors.RewriteError` if checkpointing is switched on in `model` or in a module of it."""
    for name, module in model.named_modules():
        for switch in SWITCHES:
            if getattr(module, switch, None) is True:
                where = f"{name}.{switch}" if name else switch
                raise RewriteError(
                    f"{type(model).__name__} has activation checkpointing of its own switched on ({where} is True), "
                    "and a plan decides by itself what is kept and what is recomputed. Switch one of them off: "
                    f"{_how(model)}, or planner.restore(model)."
                )


def _how(model: nn.Module) -> str:
    methods = ("activation_checkpointing_disable", "gradient_checkpointing_disable", "disable_gradient_checkpointing")
    for method in methods:
        if hasattr(model, method):
            return f"model.{method}()"
    return "model.set_grad_checkpointing(False)" if hasattr(model, "set_grad_checkpointing") else "set it to False"
