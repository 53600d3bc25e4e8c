"""Small captures for the tests of this folder."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from graph_capture.dynamo import CapturedCall, capture_call
from graph_capture.fake import fake_copy, fake_inputs, fake_mode_of
from graph_capture.joint import Joint


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> CapturedCall:
    """Trace one call of a copy of the model on fake tensors."""
    mode = fake_mode_of(model, (args, kwargs))
    twin = fake_copy(model, mode)
    fake_args, fake_kwargs = fake_inputs((args, kwargs), mode)
    with mode:
        return capture_call(twin._call_impl, fake_args, fake_kwargs)


def joint_of(model: nn.Module, *args: Any, **kwargs: Any) -> Joint:
    """The normalised joint graph for a loss that comes from output 0."""
    return captured(model, *args, **kwargs).joint((0,))


def nodes_of(joint: Joint, target: str) -> list[fx.Node]:
    """The nodes whose operator has the given name, such as `"aten.mm.default"`."""
    return [n for n in joint.module.graph.nodes if str(n.target) == target]
