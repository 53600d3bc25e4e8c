"""Scratch memory: measured alone on the CPU, declared elsewhere, and without a trace."""

from __future__ import annotations

import torch
from torch import nn

from graph_capture.allocator import AllocatorTrace
from graph_capture.workspace import DeclaredWorkspace, Footprint, MeasuredWorkspace, NoWorkspace
from tests.graph_capture.captured import joint_of, nodes_of

aten = torch.ops.aten


def test_the_allocator_sees_every_allocation() -> None:
    with AllocatorTrace(collect=True) as trace:
        kept = torch.zeros(1000)
        temporary = torch.zeros(5000)
        del temporary
    assert trace.peak_bytes == 24_000
    assert trace.end_bytes == kept.nbytes


def test_a_pointwise_operator_needs_nothing_beside_its_output() -> None:
    model = MeasuredWorkspace()
    x = torch.zeros(100)
    assert model.footprint(aten.sin.default, (x,), {}, x) == Footprint(0, 0)


def test_what_a_result_retains_is_seen() -> None:
    a, b = torch.zeros(1000), torch.zeros(1000)
    footprint = MeasuredWorkspace().footprint(aten.mse_loss.default, (a, b), {}, torch.zeros(()))
    assert footprint.scratch + footprint.retained >= 4000 - 4  # the mean lies in the storage of the squares


def test_measuring_leaves_the_random_state_alone() -> None:
    x = torch.zeros(64)
    state = torch.get_rng_state()
    MeasuredWorkspace().footprint(aten.native_dropout.default, (x, 0.3, True), {}, (x, x.bool()))
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_too_large_falls_back_to_the_declared_bound() -> None:
    joint = joint_of(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 16, 16))
    (node,) = nodes_of(joint, "aten.convolution.default")
    model = MeasuredWorkspace(limit_bytes=10)
    tensors = 4 * (3 * 16 * 16 + 4 * 3 * 9 + 4 + 4 * 14 * 14)
    assert model.of_node(node) == Footprint(tensors, 0)
    assert model.declared == {"aten.convolution.default"}
    assert not model.measured


def test_operators_with_opaque_state_are_not_tried() -> None:
    model = MeasuredWorkspace()
    x = torch.zeros(4)
    model.footprint(aten.mkldnn_rnn_layer.default, (x,), {}, x)
    assert model.declared == {"aten.mkldnn_rnn_layer.default"}


def test_a_library_keeps_a_workspace_for_matrix_products() -> None:
    x = torch.zeros(4, 4)
    assert DeclaredWorkspace(123).footprint(aten.mm.default, (x, x), {}, x).scratch == 123
    assert DeclaredWorkspace(123).footprint(aten.sin.default, (x,), {}, x).scratch == 0
    assert NoWorkspace().footprint(aten.mm.default, (x, x), {}, x) == Footprint()
