"""From nodes to operators and values: storages, views, buffers, random operators, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graph_capture.build import Binding, build_graph
from graph_capture.costs import Roofline
from graph_capture.delivery import AT_ONCE
from graph_capture.devices import DEVICES
from graph_capture.errors import CaptureError
from graph_capture.graph import Graph
from graph_capture.joint import storage_key, tensors_of
from graph_capture.workspace import NoWorkspace
from tests.graph_capture.captured import joint_of, nodes_of


def built(model: nn.Module, *args: torch.Tensor) -> tuple[Graph, Binding]:
    """Graph and binding of a model whose loss is its output 0."""
    return build_graph(joint_of(model, *args), Roofline(DEVICES["cpu"]), NoWorkspace())


class Views(nn.Module):
    """A linear map looked at in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y.view(2, 3, 2, 3).transpose(1, 2)[:, 1:].unsqueeze(0).expand(2, 2, 1, 3, 3).sin().sum()


def test_views_share_a_value_and_cost_nothing() -> None:
    graph, binding = built(Views(), torch.randn(6, 6))
    forward = [o.target for o in graph.operators if o.phase == "forward"]
    assert forward == ["aten.addmm.default", "aten.sin.default", "aten.sum.default"]
    for node, values in binding.value_of.items():
        for value in values:
            keys = {storage_key(t) for base in binding.bases[value] for t in tensors_of(base)}
            assert keys & {storage_key(t) for t in tensors_of(node)}


class Normalised(nn.Module):
    """Batch normalisation, in-place ReLU and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu_(self.norm(x)))).sum()


def test_buffers_are_written_once_and_random_operators_carry_their_state() -> None:
    graph, _ = built(Normalised(), torch.randn(16, 8))
    writes = [o for o in graph.operators if o.target == "aten.copy_.default"]
    assert len(writes) == 3  # mean, variance, number of batches
    assert all(
        not o.recomputable and o.keep_reason == "writes into a buffer or an input" and not o.outputs for o in writes
    )
    (dropout,) = [o for o in graph.operators if o.target == "aten.native_dropout.default"]
    assert dropout.recomputable
    assert dropout.random_state_bytes == torch.get_rng_state().numel()
    assert len(dropout.outputs) == 2
    (norm,) = [o for o in graph.operators if "native_batch_norm_legit" in o.target]
    assert norm.recomputable
    assert len(norm.outputs) == 5


def test_what_eager_does_in_place_may_be_done_in_place_again() -> None:
    graph, binding = built(Normalised(), torch.randn(16, 8))
    index, relu = next((i, o) for i, o in enumerate(graph.operators) if o.target == "aten.relu.default")
    ((source, target),) = relu.in_place
    assert relu.inputs == (source,)
    assert relu.outputs == (target,)
    assert binding.in_place[index, source].overload is torch.ops.aten.relu_.default


def test_gradients_are_delivered_as_soon_as_they_are_complete() -> None:
    graph, binding = built(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), torch.randn(5, 4))
    gradients = [v for v in graph.values if v.kind == "gradient"]
    assert len(gradients) == 6
    assert len({v.delivered_after for v in gradients}) == 3  # weight and bias of one layer together
    assert graph.accumulated_gradient_bytes == sum(v.size_bytes for v in gradients)
    assert all(v.delivery_copy_bytes == 0 for v in gradients)
    assert list(binding.delivery.slice_ends) == sorted(binding.delivery.slice_ends)


def test_small_gradients_wait_for_the_next_larger_one() -> None:
    layers = [nn.LayerNorm(64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.LayerNorm(64)]
    graph, binding = built(nn.Sequential(*layers), torch.randn(5, 64))
    delivered: dict[int, list[int]] = {}
    for value in graph.values:
        if value.kind == "gradient":
            delivered.setdefault(value.delivered_after or 0, []).append(value.size_bytes)
    norm, linear = [4 * 64, 4 * 64], [4 * 64, 4 * 64 * 64]
    # the last of them has nothing to wait for
    assert [sorted(sizes) for _, sizes in sorted(delivered.items())] == [sorted(norm + linear)] * 2 + [norm]
    # made by one program, and handed over in eager's order: 10 and 11 are the last normalisation's, 8 and 9 the layer's
    ends, slice_of = binding.delivery.slice_ends, binding.delivery.slice_of
    assert slice_of[10] == slice_of[11] < slice_of[8] == slice_of[9]
    assert ends[slice_of[10]] == ends[slice_of[8]] < ends[slice_of[6]]


def test_gradients_that_waited_are_handed_over_three_at_once() -> None:
    """A normalisation's two and a convolution's one, but for the last node, which returns the token's gradient, too."""
    layers = [nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)]
    _, binding = built(nn.Sequential(*layers, nn.Conv2d(8, 64, 3)), torch.randn(2, 8, 6, 6))
    delivery = binding.delivery
    slices: dict[int, list[int]] = {}
    for primal, number in delivery.slice_of.items():
        slices.setdefault(number, []).append(primal)
    ordered = [slices[number] for number in sorted(slices)]
    assert [len(primals) for primals in ordered] == ([2, 3, 2, 1] if AT_ONCE == 3 else [2, 2, 1, 2, 1])
    assert ordered[0][0] > ordered[1][0] > ordered[1][-1] > ordered[2][0] > ordered[-1][0]
    assert len(delivery.slice_ends) == 1 + len(ordered)


def test_outputs_stay_and_tangents_come_from_the_caller() -> None:
    graph, _ = built(nn.Linear(4, 4), torch.randn(5, 4))
    (loss,) = [o for o in graph.operators if o.phase == "loss"]
    assert [graph.values[v].size_bytes for v in loss.outputs] == [5 * 4 * 4]
    assert [v.size_bytes for v in graph.values if v.kind == "output"] == [5 * 4 * 4]


def test_operators_know_their_module_and_line() -> None:
    graph, _ = built(Normalised(), torch.randn(16, 8))
    (norm,) = [o for o in graph.operators if "native_batch_norm_legit" in o.target]
    assert norm.module == "norm"
    assert norm.source.startswith("graph_capture/test_build.py:")  # the line of the user, not of the library
    assert len({o.name for o in graph.operators}) == len(graph)


class OldContents(nn.Module):
    """Needs the old contents of a buffer in its backward, and overwrites it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("seen", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (self.weight * self.seen * x).sum()
        self.seen.add_(1)
        return y


def test_a_backward_that_needs_overwritten_contents_is_refused() -> None:
    with (
        pytest.warns(UserWarning, match="Error detected"),
        pytest.raises(CaptureError, match=r"modified by an inplace operation.*update a copy"),
    ):
        built(OldContents(), torch.randn(4))


def test_a_clone_that_changes_nothing_disappears() -> None:
    class Clones(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).clone().sin().sum()

    assert not nodes_of(joint_of(Clones(), torch.randn(3, 4)), "aten.clone.default")
