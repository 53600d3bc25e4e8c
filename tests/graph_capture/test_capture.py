"""Capture: what is found, what is refused, and that no trace is left."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graph_capture.capture import capture
from graph_capture.errors import CaptureError, InputsUnknownError
from graph_capture.inputs import resolve_inputs


class Classifier(nn.Module):
    """Two layers; counts its calls, to show that planning makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.calls = 0
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        self.calls += 1
        self.seen.append(1)
        scores = self.head(torch.relu(self.body(x)))
        return {"scores": scores} | ({} if labels is None else {"loss": F.cross_entropy(scores, labels)})


LABELS = torch.zeros(6, dtype=torch.long)


def cross_entropy(result: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss outside of the model."""
    return F.cross_entropy(result["scores"], LABELS)


def test_the_loss_is_found_inside_the_model() -> None:
    captured = capture(Classifier(), (torch.randn(6, 8),), {"labels": LABELS})
    assert captured.loss.location == "inside the model"
    assert len(captured.loss.outputs) == 1


def test_the_loss_of_a_loss_fn_is_part_of_the_graph() -> None:
    captured = capture(Classifier(), (torch.randn(6, 8),), loss_fn=cross_entropy)
    assert captured.loss.location == "loss_fn"
    loss = [o for o in captured.graph.operators if o.phase == "loss"]
    assert any("_log_softmax" in o.target for o in loss)
    assert all(not o.recomputable for o in loss)


def test_without_a_loss_the_report_says_so() -> None:
    captured = capture(Classifier(), (torch.randn(6, 8),))
    assert captured.loss.location == "outside the budget"
    assert any("loss_fn" in note for note in captured.notes)


def test_a_loss_fn_must_return_a_scalar_that_depends_on_the_model() -> None:
    with pytest.raises(CaptureError, match=r"one scalar tensor.*\(6, 4\)"):
        capture(Classifier(), (torch.randn(6, 8),), loss_fn=lambda result: result["scores"])
    with pytest.raises(CaptureError, match="does not depend"):
        capture(Classifier(), (torch.randn(6, 8),), loss_fn=lambda result: result["scores"].detach().sum())


def test_no_trace_is_left() -> None:
    model = Classifier()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state, python_state = torch.get_rng_state(), random.getstate()
    capture(model, (torch.randn(6, 8, generator=torch.Generator()),), {"labels": LABELS})
    assert model.calls == 0
    assert model.seen == []
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert python_state == random.getstate()
    assert not model._forward_hooks
    assert model._compiled_call_impl is None


def test_fake_tensors_are_enough() -> None:
    mode = FakeTensorMode()
    with mode:
        model, x, labels = Classifier(), torch.randn(6, 8), torch.zeros(6, dtype=torch.long)
    fake = capture(model, (x,), {"labels": labels})
    real = capture(Classifier(), (torch.randn(6, 8),), {"labels": LABELS})
    assert fake.graph.fingerprint == real.graph.fingerprint
    assert fake.program_fingerprint == real.program_fingerprint


def test_eagers_peak_is_counted() -> None:
    captured = capture(Classifier(), (torch.randn(6, 8),), {"labels": LABELS}, gradient_accumulation=False)
    assert captured.eager_peak_source == "one eager step on fake tensors"
    assert captured.eager_peak_bytes is not None
    assert captured.eager_peak_bytes > captured.graph.resident_total_bytes


class Branches(nn.Module):
    """Its path depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if y.sum() > 0:
            return y.sum()
        return (2 * y).sum()


def test_a_branch_on_data_is_refused_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+ in forward"):
        capture(Branches(), (torch.randn(3, 4),))


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda m: m.eval(), "eval mode"),
        (lambda m: m.requires_grad_(False), "no parameter that requires a gradient"),
    ],
    ids=["eval", "frozen"],
)
def test_a_model_that_is_not_trained_is_refused(prepare: Any, reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        capture(prepare(Classifier()), (torch.randn(6, 8),))


def test_planning_under_no_grad_is_refused() -> None:
    with torch.no_grad(), pytest.raises(CaptureError, match="no_grad"):
        capture(Classifier(), (torch.randn(6, 8),))


def test_unknown_inputs_are_answered_with_the_two_ways_to_say_them() -> None:
    with pytest.raises(InputsUnknownError, match=r"(?s)plan\(model, budget, example_inputs.*auto_checkpoint\("):
        capture(Classifier())
    with pytest.raises(InputsUnknownError, match="must be a tuple"):
        capture(Classifier(), torch.randn(6, 8))  # type: ignore[arg-type]
    with pytest.raises(InputsUnknownError, match="not a str"):
        capture("model")


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_an_exported_program_knows_its_inputs() -> None:
    x = torch.randn(3, 8)
    program = torch.export.export(nn.Sequential(nn.Linear(8, 4), nn.ReLU()).train(), (x,))
    module, args, kwargs = resolve_inputs(program, (), None)
    assert isinstance(module, nn.Module)
    assert torch.equal(args[0], x)
    assert kwargs == {}
    assert len(capture(program, ()).graph) > 3


def test_a_graph_module_with_values_knows_its_inputs() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    module = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 4), nn.Tanh()))
    fake = make_fx(lambda x: x.sin(), tracing_mode="fake")(torch.randn(3, 8))
    value = next(iter(fake.graph.find_nodes(op="placeholder"))).meta["val"]
    next(iter(module.graph.find_nodes(op="placeholder"))).meta["val"] = torch.empty(value.shape)
    assert resolve_inputs(module, (), None)[1][0].shape == (3, 8)
    assert len(capture(module).graph) > 2
