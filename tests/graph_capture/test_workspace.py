"""Scratch memory: measured alone on the CPU, declared elsewhere, and without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graph_capture import workspace
from graph_capture.allocator import AllocatorTrace
from graph_capture.workspace import (
    DeclaredWorkspace,
    Footprint,
    MeasuredWorkspace,
    NoWorkspace,
    _measure,
    has_fast_products,
)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_that_the_cpu_emulates_are_tried_only_where_they_are_small(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds of one large product would be minutes; small ones show that nothing is needed beside the result."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = MeasuredWorkspace()
    assert not has_fast_products(dtype)
    assert has_fast_products(torch.float32)
    large, bias = torch.zeros(1024, 1024, dtype=dtype), torch.zeros(1024, dtype=dtype)
    monkeypatch.setattr(workspace, "_measure", _not_to_be_called)
    assert model.footprint(aten.mm.default, (large, large.t()), {}, large) == Footprint()
    assert model.footprint(aten.addmm.default, (bias, large, large), {}, large) == Footprint()
    assert model.footprint(aten.bmm.default, (large[None], large[None]), {}, large[None]) == Footprint()
    assert model.declared == {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"}
    monkeypatch.undo()
    with torch.backends.mkldnn.flags(enabled=False):
        _measure.cache_clear()
        for a in (torch.zeros(48, 80, dtype=dtype), torch.zeros(80, 48, dtype=dtype).t()):
            for b in (torch.zeros(80, 64, dtype=dtype), torch.zeros(64, 80, dtype=dtype).t()):
                result, bias = torch.zeros(48, 64, dtype=dtype), torch.zeros(64, dtype=dtype)
                assert model.footprint(aten.mm.default, (a, b), {}, result) == Footprint()
                assert model.footprint(aten.addmm.default, (bias, a, b), {}, result) == Footprint()
                pair = (a.expand(2, *a.shape), b.expand(2, *b.shape))
                assert model.footprint(aten.bmm.default, pair, {}, result.expand(2, 48, 64)) == Footprint()
        _measure.cache_clear()


def _not_to_be_called(*arguments: object) -> Footprint:
    raise AssertionError(f"measured: {arguments}")


def test_a_call_runs_once_unless_something_is_retained(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    traced = workspace._traced

    def noted(target: Any, positional: Any, keyword: Any) -> Footprint:
        runs.append(str(target))
        return traced(target, positional, keyword)

    monkeypatch.setattr(workspace, "_traced", noted)
    model = MeasuredWorkspace()
    x = torch.zeros(107)
    model.footprint(aten.cos.default, (x,), {}, x)
    model.footprint(aten.mse_loss.default, (x, x), {}, torch.zeros(()))
    assert runs == ["aten.cos.default", "aten.mse_loss.default", "aten.mse_loss.default"]


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
