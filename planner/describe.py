"""What a plan says of the world that it was made in: model, inputs, environment."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from planner.plan_parts import Environment, InputRow, ModelIdentity, OtherInput, TensorInput
from solvers.solution import Solver


def describe_model(model: nn.Module) -> ModelIdentity:
    """Class and parameters of a model. `fully_shard` makes a class of its own, in front of the model's, which stays."""
    kind = type(model)
    if any(base.__name__ == "FSDPModule" for base in kind.__bases__):
        kind = next(base for base in kind.__bases__ if base.__name__ != "FSDPModule")
    rows = ((n, tuple(p.shape), _dtype(p.dtype), p.requires_grad) for n, p in model.named_parameters())
    return ModelIdentity.of(f"{kind.__module__}.{kind.__qualname__}", rows)


def describe_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[InputRow, ...]:
    """One row for each leaf of the nested inputs."""
    leaves, _ = tree_flatten_with_path({"args": tuple(args), "kwargs": dict(kwargs)})
    rows: list[InputRow] = []
    for path, leaf in leaves:
        name = f"{path[0].key}{keystr(path[1:])}"  # type: ignore[attr-defined]
        if isinstance(leaf, torch.Tensor):
            rows.append(TensorInput(path=name, shape=tuple(leaf.shape), dtype=_dtype(leaf.dtype)))
        else:
            rows.append(OtherInput(path=name, value=repr(leaf)[:200]))
    return tuple(rows)


def describe_environment(device: str) -> Environment:
    """Versions and device."""
    return Environment(
        python=platform.python_version(),
        torch=str(torch.__version__),
        platform=platform.platform(terse=True),
        device=device,
        default_dtype=_dtype(torch.get_default_dtype()),
    )


def describe_solver(solver: Solver) -> dict[str, Any]:
    """Name and options, from which the same solver can be made again."""
    options = dataclasses.asdict(solver) if dataclasses.is_dataclass(solver) else {}  # type: ignore[call-overload]
    return {"name": solver.name, "options": options}


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
