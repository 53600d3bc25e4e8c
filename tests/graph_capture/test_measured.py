"""Measured seconds: every distinct call once, no trace left behind, and a plan that is made of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graph_capture import measured
from graph_capture.capture import capture
from graph_capture.costs import FlopCount, Roofline, cost_model
from graph_capture.devices import DEVICES
from graph_capture.errors import CaptureError
from graph_capture.measured import Measured
from planner import Plan, plan, rewrite


class Blocks(nn.Module):
    """Equal blocks, with dropout."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(n))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.dropout(torch.tanh(layer(x)))
        return x.square().mean()


def test_cost_models_by_name() -> None:
    device = DEVICES["cpu"]
    assert isinstance(cost_model("roofline", device), Roofline)
    assert isinstance(cost_model("flops", device), FlopCount)
    assert isinstance(cost_model("measured", device), Measured)
    with pytest.raises(ValueError, match="costs is 'guessed'; it must be 'roofline', 'measured' or 'flops'"):
        cost_model("guessed", device)  # type: ignore[arg-type]


def test_each_distinct_call_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured._timed.cache_clear()
    captured = capture(Blocks(4), (torch.randn(8, 16),), costs="measured")
    calls = measured._timed.cache_info()
    assert calls.misses < calls.hits + calls.misses
    assert calls.misses < sum(o.phase != "loss" for o in captured.graph.operators)
    again = capture(Blocks(4), (torch.randn(8, 16),), costs="measured")
    assert measured._timed.cache_info().misses == calls.misses
    assert [o.seconds for o in again.graph.operators] == [o.seconds for o in captured.graph.operators]


def test_seconds_are_positive_and_equal_for_equal_calls() -> None:
    captured = capture(Blocks(4), (torch.randn(8, 16),), costs="measured")
    by_target: dict[str, set[float]] = {}
    for operator in captured.graph.operators:
        assert operator.seconds > 0 or operator.phase == "loss"  # the model returns its loss
        by_target.setdefault(operator.target, set()).add(operator.seconds)
    assert len(by_target["aten.tanh.default"]) == 1


def test_only_prices_differ() -> None:
    """The same program, memory and FLOPs: a plan made of measured seconds is run like any other."""
    model, x = Blocks(), torch.randn(8, 16)
    graphs = [capture(model, (x,), costs=costs).graph for costs in ("roofline", "measured", "flops")]  # type: ignore[arg-type]
    assert len({graph.fingerprint for graph in graphs}) == 1
    assert len({graph.step_flops for graph in graphs}) == 1
    assert len({graph.step_seconds for graph in graphs}) == 3


def test_no_trace_is_left_in_the_random_state() -> None:
    measured._timed.cache_clear()
    model, x = Blocks(), torch.randn(8, 16)
    before = torch.get_rng_state()
    capture(model, (x,), costs="measured")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_tried_is_estimated_at_the_measured_scale() -> None:
    model, x = Blocks(), torch.randn(8, 16)
    captured = capture(model, (x,), costs="measured")
    assert not any("seconds are estimated" in note for note in captured.notes)
    small = Measured(DEVICES["cpu"], limit_bytes=0)
    linear = torch.fx.symbolic_trace(nn.Tanh())
    node = next(n for n in linear.graph.nodes if n.op == "call_function")
    node.meta["val"] = torch.zeros(3)
    for argument in node.all_input_nodes:
        argument.meta["val"] = torch.zeros(3)
    estimate = small.price(node)
    assert estimate.seconds == Roofline(DEVICES["cpu"]).price(node).seconds
    assert small.estimated == {str(node.target)}


def test_a_device_that_is_not_here_cannot_be_measured() -> None:
    with pytest.raises(CaptureError, match="costs='measured' needs the device itself, and h100-80gb is not here"):
        capture(Blocks(), (torch.randn(8, 16),), device="h100-80gb", costs="measured")


def test_a_plan_of_measured_seconds(tmp_path: object) -> None:
    torch.manual_seed(0)
    model, x = Blocks(6), torch.randn(64, 16)
    made = plan(model, "90%", (x,), costs="measured")
    assert made.settings["costs"] == "measured"
    assert Plan.from_json(made.to_json()).settings["costs"] == "measured"
    torch.manual_seed(1)
    expected = torch.autograd.grad(model(x), list(model.parameters()))
    planned = rewrite(model, made)
    torch.manual_seed(1)
    planned(x).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(planned.parameters(), expected, strict=True))
