"""The joint graph's normal form: no needless clones, no dead operators, buffer writes as early as may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graph_capture.dynamo import capture_call
from graph_capture.fake import fake_copy, fake_inputs
from graph_capture.joint import Joint, is_mutation, is_random

aten = torch.ops.aten


class Calls(nn.Module):
    """Runs a function on x and a parameter of the same shape."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("count", torch.zeros(6))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def joint_of(function: Callable[..., Any], shape: tuple[int, ...] = (4, 6)) -> Joint:
    mode = FakeTensorMode()
    mode.allow_non_fake_inputs = True
    module = fake_copy(Calls(function), mode)
    with mode:
        call = capture_call(module._call_impl, fake_inputs((torch.ones(shape),), mode), {})
        return call.joint((0,))


def targets(joint: Joint) -> list[Any]:
    return [n.target for n in joint.module.graph.nodes if n.op == "call_function"]


def test_primals_tangents_and_gradients() -> None:
    joint = joint_of(lambda m, x: (x * m.weight).sum())
    assert len(joint.tangents) == 1
    assert len(joint.gradients) == len(joint.primals)
    assert joint.primals[0].name == joint.module.graph.find_nodes(op="placeholder")[0].name
    (weight,) = [p for p, g in enumerate(joint.gradients) if g is not None]
    assert joint.primals[weight].meta["val"].shape == (4, 6)


def test_clones_that_change_nothing_disappear() -> None:
    joint = joint_of(lambda m, x: ((x * m.weight).clone() * 2).sum())
    assert aten.clone.default not in targets(joint)


def test_clones_that_change_the_layout_stay() -> None:
    joint = joint_of(lambda m, x: ((x * m.weight).t().contiguous() * 2).sum())
    assert aten.clone.default in targets(joint)


def test_a_clone_of_what_is_written_later_stays() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        before = m.count.clone()
        m.count.add_(1)
        return ((x * m.weight) * before).sum()

    joint = joint_of(function)
    assert aten.clone.default in targets(joint)


def test_dead_operators_disappear_but_for_random_ones() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        torch.exp(x)
        torch.rand(3)
        return (x * m.weight).sum()

    found = targets(joint_of(function))
    assert aten.exp.default not in found
    assert aten.rand.default in found


def test_buffers_are_written_before_the_backward() -> None:
    joint = joint_of(lambda m, x: m.norm(x * m.weight).square().sum())
    nodes = list(joint.module.graph.nodes)
    tangent_users = [i for i, n in enumerate(nodes) if set(n.all_input_nodes) & set(joint.tangents)]
    writes = [i for i, n in enumerate(nodes) if n.op == "call_function" and is_mutation(n)]
    assert len(writes) == 3  # mean, variance, number of batches
    assert max(writes) < min(tangent_users)


def test_the_backward_of_batch_norm_does_not_hold_the_running_statistics() -> None:
    joint = joint_of(lambda m, x: m.norm(x * m.weight).square().sum())
    (backward,) = joint.module.graph.find_nodes(op="call_function", target=aten.native_batch_norm_backward.default)
    assert backward.args[3:5] == (None, None)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda m, x: F.dropout(x * m.weight, 0.5).sum(), 1),
        (lambda m, x: F.dropout(x * m.weight, 0.5, training=False).sum(), 0),
        (lambda m, x: (x * m.weight * torch.rand_like(x)).sum(), 1),
        (lambda m, x: (x * m.weight * torch.bernoulli(torch.full_like(x, 0.5))).sum(), 1),
        (lambda m, x: F.scaled_dot_product_attention(*[(x * m.weight)[None, None]] * 3).sum(), 0),
    ],
)
def test_random_operators(function: Callable[..., Any], count: int) -> None:
    joint = joint_of(function)
    assert sum(is_random(n) for n in joint.module.graph.nodes if n.op == "call_function") == count


def test_views_of_uncertain_layout_may_copy() -> None:
    """Batch normalisation of a transposed tensor returns other strides than torch records."""

    def function(m: Any, x: Tensor) -> Tensor:
        y = m.norm((x * m.weight.view(4, 6, 1)).transpose(1, 2).reshape(12, 6)[None].transpose(1, 2))
        return y.transpose(1, 2).reshape(-1).square().sum()

    found = targets(joint_of(function, (4, 6, 3)))
    assert aten.reshape.default in found or aten.clone.default in found
