"""FLOPs are exact where a formula exists, and an operator without one is never free."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from graph_capture.build import build_graph
from graph_capture.costs import FlopCount, Roofline, bytes_moved
from graph_capture.devices import DEVICES
from graph_capture.flops import flops_of
from graph_capture.workspace import NoWorkspace
from tests.graph_capture.captured import joint_of, nodes_of


def test_a_linear_layer_costs_two_flops_per_multiply_add() -> None:
    joint = joint_of(nn.Linear(5, 7), torch.randn(3, 5))
    (forward,) = nodes_of(joint, "aten.addmm.default")
    assert flops_of(forward) == 2 * 3 * 5 * 7
    (weight_gradient,) = nodes_of(joint, "aten.mm.default")
    assert flops_of(weight_gradient) == 2 * 3 * 5 * 7


def test_a_convolution_and_its_backward() -> None:
    joint = joint_of(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)), torch.randn(2, 3, 8, 8)
    )
    first, second = nodes_of(joint, "aten.convolution.default")
    assert flops_of(first) == 2 * 2 * 8 * 8 * 4 * 3 * 9
    assert flops_of(second) == 2 * 2 * 8 * 8 * 6 * 4 * 9
    costs = sorted(flops_of(n) for n in nodes_of(joint, "aten.convolution_backward.default"))
    assert costs == [flops_of(first), 2 * flops_of(second)]  # the first layer's input needs no gradient


class Attention(nn.Module):
    """Scaled-dot-product attention over a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(2, 10, 4, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).sum()


def test_attention_on_the_cpu_is_not_free() -> None:
    joint = joint_of(Attention(), torch.randn(2, 10, 16))
    (forward,) = nodes_of(joint, "aten._scaled_dot_product_flash_attention_for_cpu.default")
    (backward,) = nodes_of(joint, "aten._scaled_dot_product_flash_attention_for_cpu_backward.default")
    assert flops_of(forward) == 2 * (2 * 2 * 4 * 10 * 10 * 4)
    assert flops_of(backward) == 5 * (2 * 2 * 4 * 10 * 10 * 4)


def test_what_has_no_formula_is_priced_by_bytes() -> None:
    joint = joint_of(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(8, 4))
    (tanh,) = nodes_of(joint, "aten.tanh.default")
    assert flops_of(tanh) is None
    assert bytes_moved(tanh) == 2 * 8 * 4 * 4
    price = Roofline(DEVICES["cpu"]).price(tanh)
    assert price.priced_by == "bytes"
    assert price.seconds == 2 * 8 * 4 * 4 / DEVICES["cpu"].bytes_per_second + DEVICES["cpu"].launch_seconds
    assert FlopCount().price(tanh).seconds == 2 * 8 * 4 * 4


def test_the_roofline_is_the_larger_of_arithmetic_and_traffic() -> None:
    joint = joint_of(nn.Linear(512, 512), torch.randn(512, 512))
    (forward,) = nodes_of(joint, "aten.addmm.default")
    device = DEVICES["h100-80gb"]
    price = Roofline(device).price(forward)
    arithmetic, traffic = 2 * 512**3 / device.peak_flops("float32"), bytes_moved(forward) / device.bytes_per_second
    assert price.seconds == max(arithmetic, traffic) + device.launch_seconds
    assert price.priced_by == "flops"


def test_a_cpu_draws_random_numbers_more_slowly_than_it_moves_them() -> None:
    device, elements = DEVICES["cpu"], 64 * 32
    joint = joint_of(nn.Dropout(0.5), torch.randn(64, 32, requires_grad=True))
    (dropout,) = nodes_of(joint, "aten.native_dropout.default")
    price = Roofline(device).price(dropout)
    assert price.seconds == elements / device.random_numbers_per_second + device.launch_seconds
    assert price.seconds > 10 * bytes_moved(dropout) / device.bytes_per_second
    card = DEVICES["h100-80gb"]
    assert Roofline(card).price(dropout).seconds == bytes_moved(dropout) / card.bytes_per_second + card.launch_seconds
    (backward,) = nodes_of(joint, "aten.native_dropout_backward.default")
    assert Roofline(device).price(backward).seconds < price.seconds


def test_the_graph_adds_them_up() -> None:
    graph, _ = build_graph(joint_of(nn.Linear(5, 7), torch.randn(3, 5)), Roofline(DEVICES["cpu"]), NoWorkspace())
    assert graph.step_flops == 2 * (2 * 3 * 5 * 7)
