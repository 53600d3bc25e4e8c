"""Capture on real architectures: the program at run time is the one that was planned, and nothing is left behind."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from graph_capture.capture import BOOKKEEPING_BYTES, Capture, capture
from graph_capture.errors import CaptureError, InputsUnknownError
from planner import plan, rewrite
from planner.measure import loss_of
from solvers.store_all import StoreAll
from tests.models import MODELS, Case, Perceptron, ReturnsDict, features


def captured(case: Case, **options: Any) -> Capture:
    return capture(case.model, case.args, case.kwargs, loss_fn=case.loss_fn, **options)


@pytest.mark.parametrize("name", ["gpt2_sdpa", "t5", "whisper", "resnet", "unet", "lstm", "returns_dict"])
def test_run_time_meets_the_planned_program(name: str) -> None:
    """With `on_change="error"` any other program than the planned one is refused."""
    case = MODELS[name]()
    made = plan(case.model, "1TiB", case.args, case.kwargs, loss_fn=case.loss_fn, solver=StoreAll())
    rewrite(case.model, made, on_change="error")
    loss_of(case.model(*case.args, **case.kwargs), case.loss_fn).backward()
    graph = made.to_graph()
    (record,) = case.model._compiled_call_impl.backend.records  # type: ignore[union-attr]
    assert record.kind == "training"
    assert record.operators == len(graph) - sum(o.phase == "loss" for o in graph.operators) + 1


def test_nothing_is_left_in_a_large_module() -> None:
    case = MODELS["gpt2_eager"]()
    module = case.model
    before = {k: v.clone() for k, v in module.state_dict().items()}
    attributes = {n: dict(vars(m)) for n, m in module.named_modules()}
    config = module.config.to_dict()  # type: ignore[union-attr,operator]
    random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), torch.get_rng_state()
    captured(case)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert {n: dict(vars(m)) for n, m in module.named_modules()} == attributes
    assert module.config.to_dict() == config  # type: ignore[union-attr,operator]
    assert all(p.grad is None for p in module.parameters())


def test_what_the_forward_sets_stays_out_of_the_module() -> None:
    class Keeps(Perceptron):
        last: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = x * 2
            return super().forward(x).sum()

    module = Keeps()
    capture(module, (features(),))
    assert module.last is None


def test_resident_bytes_count_every_storage_once() -> None:
    case = MODELS["gpt2_sdpa"]()  # tied embeddings
    graph = captured(case, extra_bytes={"headroom": 1000}).graph
    assert graph.resident_bytes["parameters"] == sum(p.nbytes for p in case.model.parameters())
    assert graph.resident_bytes["inputs"] == sum(t.nbytes for t in case.kwargs.values())
    assert graph.resident_bytes["headroom"] == 1000
    assert graph.resident_bytes["bookkeeping"] == BOOKKEEPING_BYTES


def test_captures_are_deterministic() -> None:
    one, other = captured(MODELS["vit"]()), captured(MODELS["vit"]())
    assert one.graph.fingerprint == other.graph.fingerprint
    assert one.program_fingerprint == other.program_fingerprint
    assert one.eager_peak_bytes == other.eager_peak_bytes


def test_shapes_are_in_the_fingerprint_but_not_in_the_structure() -> None:
    module = MODELS["names_input"]().model
    small = capture(module, (features(64),), loss_fn=torch.sum)
    large = capture(module, (features(128),), loss_fn=torch.sum)
    assert small.program_fingerprint != large.program_fingerprint
    assert small.program_structure == large.program_structure


def test_a_model_of_another_library_brings_its_inputs() -> None:
    made = capture(MODELS["gpt2_sdpa"]().model)
    assert made.loss.location == "inside the model"
    assert set(made.kwargs) == {"input_ids", "labels"}


def test_inputs_that_are_no_tuple() -> None:
    with pytest.raises(InputsUnknownError, match="tuple"):
        capture(Perceptron(), features())  # type: ignore[arg-type]


def test_what_is_no_module() -> None:
    with pytest.raises(InputsUnknownError, match="function"):
        capture(lambda x: x, (features(),))


def test_fake_tensors_of_two_modes_are_refused() -> None:
    with FakeTensorMode():
        module = Perceptron()
    with FakeTensorMode():
        x = torch.empty(256, 32)
    with pytest.raises(CaptureError, match="different FakeTensorModes"):
        capture(module, (x,))


def test_missing_and_extra_arguments() -> None:
    batch = {"inputs": [features()], "labels": torch.zeros(256, dtype=torch.long)}
    for args, kwargs in (((), {"scale": 1.0}), ((batch, batch), {}), ((batch,), {"unknown": 1})):
        with pytest.raises((TypeError, CaptureError), match="argument"):
            capture(ReturnsDict(), args, kwargs)


def test_inputs_of_a_wrong_shape() -> None:
    with pytest.raises((CaptureError, RuntimeError), match=r"shape|size|dimension"):
        capture(Perceptron(), (torch.randn(4, 5),))


def test_a_model_that_cannot_be_copied() -> None:
    class Holds(Perceptron):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("it holds a lock")

    with pytest.raises(CaptureError, match=r"cannot be copied.*it holds a lock"):
        capture(Holds(), (features(),))
