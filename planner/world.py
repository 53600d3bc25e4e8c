"""What is another world than the one that a plan was made in: model, mode, inputs, device, versions, spelled out.

A plan may be used wherever the model gives the plan's graph, so most of these differences are no error by themselves.
They are what a user wants to read when the graph is another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graph_capture.devices import device_by_name
from planner.describe import describe_environment, describe_inputs, describe_model
from planner.plan_file import Plan
from planner.plan_parts import input_differences

SHOWN = 5
"""Of many differences the first ones are enough to act on."""


def model_differences(plan: Plan, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """How the model, its mode and its inputs differ from the plan's, one sentence each; empty if they do not."""
    found = plan.model.differences(describe_model(model))
    found += input_differences(plan.inputs, describe_inputs(args, kwargs))
    if model.training != plan.training:
        modes = {True: "training", False: "evaluation"}
        found.append(f"the model is in {modes[model.training]} mode, the plan was made in {modes[plan.training]} mode")
    return found


def environment_differences(plan: Plan, model: nn.Module | None = None) -> list[str]:
    """How the device and the versions differ from those that the plan was made with and for."""
    found: list[str] = []
    here = describe_environment(plan.environment.device)
    if model is not None:
        types = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
        planned = "cuda" if device_by_name(plan.settings["device"]).memory_bytes else "cpu"
        if types and types != {planned}:
            found.append(f"the model is on {' and '.join(sorted(types))}, the plan is for {plan.environment.device}")
    if here.torch != plan.environment.torch:
        found.append(f"this is torch {here.torch}, the plan was made with torch {plan.environment.torch}")
    if here.default_dtype != plan.environment.default_dtype:
        found.append(f"the default dtype is {here.default_dtype}, it was {plan.environment.default_dtype}")
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            found.append(f"autocast is on ({torch.get_autocast_dtype(kind)}), which a plan does not record")
    return found


def world_differences(plan: Plan, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """All of them."""
    return model_differences(plan, model, args, kwargs) + environment_differences(plan, model)


def shown(differences: Sequence[str]) -> str:
    """The first few, in one line."""
    more = f"; and {len(differences) - SHOWN} more differences" if len(differences) > SHOWN else ""
    return "; ".join(differences[:SHOWN]) + more
