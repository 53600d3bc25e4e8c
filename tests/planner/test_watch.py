"""`watch`: each step's memory against its prediction, and the first operator at which they part."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import planner.compile_backend  # noqa: F401  (makes the backend's name known)
from graph_capture.graph import Graph
from planner import (
    Plan,
    WatchedStep,
    WatchError,
    auto_checkpoint,
    marks,
    plan,
    plan_blocks,
    rewrite,
    watch,
    watching,
)
from planner.planned_call import planned_call
from planner.watch_report import BETWEEN
from tests.planner.stress import RecomputeAlways


class Mlp(nn.Module):
    """Dropout, so that a recomputation carries a random state."""

    def __init__(self) -> None:
        super().__init__()
        layers = [[nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.2)] for _ in range(2)]
        self.layers = nn.Sequential(*(m for layer in layers for m in layer))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


class Convnet(nn.Module):
    """Convolutions with workspace, BatchNorm, pooling, ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.convolution(x)), inplace=True), 2)
        return F.relu(self.second(x)).mean()


class Transformer(nn.Module):
    """One layer of attention and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.heads = nn.Linear(32, 96)
        self.norm = nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = self.heads(self.norm(x)).unflatten(-1, (4, 24)).transpose(1, 2).chunk(3, dim=-1)
        y = x + F.scaled_dot_product_attention(q, k, v, dropout_p=0.1).transpose(1, 2).flatten(2)
        return F.cross_entropy((y @ self.embedding.weight.T).flatten(0, 1), ids.flatten())


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (Mlp, lambda: torch.linspace(-1, 1, 256 * 64).reshape(256, 64)),
    "convnet": (Convnet, lambda: torch.linspace(-1, 1, 4 * 3 * 256).reshape(4, 3, 16, 16)),
    "transformer": (Transformer, lambda: torch.arange(4 * 16).reshape(4, 16) % 50),
}
_PLANS: dict[str, Plan] = {}


def planned(name: str = "mlp") -> tuple[nn.Module, Tensor, Plan]:
    """A model that runs a plan in which everything is recomputed, and its input."""
    make, x = CASES[name][0], CASES[name][1]()
    torch.manual_seed(0)
    model = make()
    if name not in _PLANS:
        _PLANS[name] = plan(model, "1GiB", (x,), solver=RecomputeAlways())
        assert _PLANS[name].overhead > 0
    return rewrite(model, _PLANS[name], on_change="error"), x, _PLANS[name]


class Mean(nn.Module):
    """A loss."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


def small() -> tuple[nn.Module, Tensor]:
    """A model without a plan, and its input."""
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.ones(64, 8)


@functools.cache
def _compiled() -> tuple[nn.Module, Tensor, Plan]:
    return planned()


@pytest.fixture
def steady() -> tuple[nn.Module, Tensor]:
    """A planned model that is compiled once for all tests, without gradients, and its input."""
    model, x, _ = _compiled()
    model.zero_grad()
    return model, x


@pytest.mark.parametrize("name", CASES)
def test_every_execution_is_as_predicted(name: str) -> None:
    model, x, made = planned(name)
    with watch(model, tolerance=0, on_part="raise") as report:
        for _ in range(2):
            model(x).backward()
    graph = made.to_graph()
    assert [step.regime for step in report.steps] == ["first", "later"]
    for step, peak in zip(report.steps, (made.first_peak_bytes, made.later_peak_bytes), strict=True):
        assert step.complete
        assert step.holds
        assert step.over is None
        assert step.predicted_peak_bytes == peak
        assert step.tolerance_bytes == graph.resident_bytes["bookkeeping"]
        assert len(step.executions) == len(made.to_schedule().order) - made.loss_operators + 1
        assert any(e.again for e in step.executions)
        for execution, actual in zip(step.executions, step.actual_bytes, strict=True):
            workspace = next(o.workspace_bytes for o in graph.operators if o.name == execution.operator)
            assert actual is not None
            # Scratch memory depends on the cache of primitives; a prediction has the most of it.
            assert -64 - workspace <= actual - execution.predicted_bytes <= 0, execution
    assert report.holds
    assert str(report).startswith("step 1: ok (first micro-batch): predicted peak ")


def test_gradients_are_the_same_bits(steady: tuple[nn.Module, Tensor]) -> None:
    plain = Mlp()
    model, x = steady
    plain.load_state_dict(model.state_dict())
    for one in (plain, model):
        torch.manual_seed(5)
        with watch(model) if one is model else contextlib.nullcontext():
            one(x).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_without_a_watch_the_plain_programs_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = planned()
    monkeypatch.setattr(marks, "with_marks", lambda program: pytest.fail("a program with marks was made"))
    model(x).backward()
    monkeypatch.undo()
    made: list[Any] = []
    with_marks = marks.with_marks
    monkeypatch.setattr(marks, "with_marks", lambda program: made.append(program) or with_marks(program))
    for _ in range(2):
        with watch(model):
            model(x).backward()
    assert len(made) == len(set(map(id, made))) > 1  # each program once
    monkeypatch.setattr(marks, "mark", lambda execution: pytest.fail("a program with marks ran"))
    model(x).backward()


def falsify(model: nn.Module, change: Callable[[Graph], Graph]) -> None:
    """Let the prediction come from another graph than the program."""
    call: Any = planned_call(model)
    expect = call.backend.expect

    def falsified(bare: Graph) -> Any:
        expectation = expect(bare)
        return dataclasses.replace(expectation, graph=change(expectation.graph))

    call.backend.expect = falsified


def test_the_operator_whose_bytes_are_wrong_is_named() -> None:
    model, x, made = planned()
    index, operator = next((i, o) for i, o in enumerate(made.to_graph().operators) if "dropout" in o.target)
    wrong = operator.outputs[0]

    def change(graph: Graph) -> Graph:
        smaller = dataclasses.replace(graph.values[wrong], size_bytes=1024)
        return dataclasses.replace(graph, values=(*graph.values[:wrong], smaller, *graph.values[wrong + 1 :]))

    falsify(model, change)
    with watch(model) as report:
        model(x).backward()
    (step,) = report.steps
    assert step.over is not None
    assert step.over.execution.operator == operator.name
    assert step.executions[step.over.position] == step.over.execution
    assert step.over.actual_bytes - step.over.execution.predicted_bytes == pytest.approx(256 * 64 * 4 - 1024, abs=64)
    assert step.under is None
    where = f"{operator.target} ({operator.module}, {operator.source}) in the forward"
    assert f"more than predicted first at {where}: predicted " in str(report)
    assert operator.module == "layers.2"
    assert made.to_schedule().order[step.over.position] == index


def test_what_is_not_used_is_no_failure() -> None:
    model, x, made = planned()
    last = made.to_graph().operators[-1].name

    def change(graph: Graph) -> Graph:
        inflated = dataclasses.replace(graph.operators[-1], workspace_bytes=10**6)
        return dataclasses.replace(graph, operators=(*graph.operators[:-1], inflated))

    falsify(model, change)
    with watch(model, on_part="raise") as report:
        model(x).backward()
    (step,) = report.steps
    assert step.holds
    assert step.over is None
    assert step.under is not None
    assert step.under.execution.operator == last
    assert "less than predicted first at" in str(step)


def test_over_the_budget_needs_no_tolerance() -> None:
    model, x, made = planned()
    call: Any = planned_call(model)
    expect = call.backend.expect
    tight = made.first_peak_bytes - 128
    call.backend.expect = lambda bare: dataclasses.replace(expect(bare), budget_bytes=tight)
    with watch(model, tolerance=0.5) as report:
        model(x).backward()
    (step,) = report.steps
    assert step.over is None
    assert step.over_budget is not None
    assert not step.holds
    assert made.simulation().timeline_bytes[made.to_schedule().order.index(0)] < tight
    assert "over the budget first at" in str(step)


def test_the_callers_code_between_forward_and_backward(steady: tuple[nn.Module, Tensor]) -> None:
    model, x = steady
    kept = []

    def step() -> None:
        loss = model(x)
        kept.append(torch.zeros(1_000_000))
        loss.backward()

    seen: list[WatchedStep] = []
    with watch(model, on_part=seen.append) as report:
        step()
        step()
    first, second = report.steps
    assert first.over is not None
    assert str(first.over.execution) == BETWEEN
    assert first.over.actual_bytes - first.over.execution.predicted_bytes == pytest.approx(4_000_000, abs=64)
    assert first.beside_bytes == 0
    assert second.beside_bytes == 4_000_000
    assert "more beside the step than when the first one began" in str(second)
    assert seen == [first, second]
    with pytest.warns(UserWarning, match=f"watched step 3: OVER.*\n.*{BETWEEN}"):
        watching._tell(3, first, "warn")
    with pytest.raises(WatchError, match="watched step 1: OVER"), watch(model, on_part="raise"):
        step()


def test_two_calls_before_a_backward(steady: tuple[nn.Module, Tensor]) -> None:
    model, x = steady
    with watch(model) as report:
        (model(x) + model(x)).backward()
    first, second = report.steps
    assert first.complete
    assert second.complete
    assert second.holds
    assert first.over is not None
    assert str(first.over.execution) == BETWEEN  # the second call lives between the first one's programs


def test_a_second_backward_of_the_same_call_is_not_listened_to(steady: tuple[nn.Module, Tensor]) -> None:
    model, x = steady
    with watch(model) as report:
        loss = model(x)
        loss.backward(retain_graph=True)
        loss.backward()
    (step,) = report.steps
    assert step.complete


def test_a_step_that_is_not_watched_to_its_end(steady: tuple[nn.Module, Tensor]) -> None:
    model, x = steady
    with watch(model) as report:
        loss = model(x)
    loss.backward()
    (step,) = report.steps
    assert not step.complete
    assert step.holds
    assert step.actual_bytes[0] is not None
    assert "not watched to its end" in str(step)


def test_an_error_passes_and_the_report_is_there(steady: tuple[nn.Module, Tensor]) -> None:
    model, x = steady
    with pytest.raises(KeyError, match="mine"), watch(model) as report:  # noqa: PT012
        model(x).backward()
        raise KeyError("mine")
    assert len(report.steps) == 1
    with watch(model) as report:
        assert "no step has been watched" in str(report)
        model(x).backward()
    assert len(report.steps) == 1


def test_a_step_that_the_plan_does_not_cover() -> None:
    model, x = small()
    rewrite(model, plan(model, "1GiB", (x,), loss_fn=torch.mean, gradient_accumulation=False))
    with watch(model) as report:
        for _ in range(2):
            model(x).mean().backward()
    assert [step.covered for step in report.steps] == [True, False]
    assert "gradient_accumulation=False" in str(report.steps[1])


def test_an_output_that_is_held_until_the_next_step_returns() -> None:
    model, x = small()
    rewrite(model, plan(model, "1GiB", (x,), loss_fn=torch.mean))
    with watch(model, tolerance=0, on_part="raise") as report:
        for _ in range(3):
            output = model(x)
            output.mean().backward()
        del output
    first, _, last = report.steps
    # Beside .grad and the output: the token and the loss, which the output's own graph holds.
    assert last.actual_peak_bytes == pytest.approx(first.actual_peak_bytes + 4 * 72, abs=32)
    assert last.beside_bytes == pytest.approx(x.nbytes, abs=32)
    for step in report.steps:
        assert step.over is None
        assert step.under is None or step.under.execution.program == "loss"


def test_another_shape_is_compared_with_its_own_prediction(steady: tuple[nn.Module, Tensor]) -> None:
    model, x = steady
    with watch(model, tolerance=0, on_part="raise") as report:
        model(x[:100]).backward()
    (step,) = report.steps
    assert step.complete
    assert step.over is None
    assert step.predicted_peak_bytes < _PLANS["mlp"].first_peak_bytes


def test_auto_checkpoint_and_a_model_around_the_planned_one() -> None:
    model, x = small()
    auto_checkpoint(model, "1GiB", loss_fn=torch.mean)
    around = nn.Sequential(model)
    with watch(around, tolerance=0, on_part="raise") as report:
        around(x).mean().backward()
    assert report.steps[0].complete


def test_torch_compile() -> None:
    model, x = small()
    function = torch.compile(nn.Sequential(model, Mean()), backend="checkpoint_planner", options={"budget": "1GiB"})
    with pytest.raises(WatchError, match=r"watch\(\) without a model"), watch(function):
        pass
    with watch(tolerance=0, on_part="raise") as report:
        function(x).backward()
    assert report.steps[0].complete


def test_only_the_model_that_was_named(steady: tuple[nn.Module, Tensor]) -> None:
    model, x = steady
    other, _, _ = planned()
    with watch(model) as report:
        other(x).backward()
        model(x).backward()
        other(x).backward()
    assert len(report.steps) == 1


def test_where_nothing_could_be_seen(steady: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = steady
    with pytest.raises(WatchError, match="Mlp has no plan"), watch(Mlp()):
        pass
    with pytest.raises(WatchError, match="no step of a planned model ran"), watch(model), torch.no_grad():
        model(x)
    with pytest.raises(WatchError, match="one at a time"), watch(model), watch(model):
        pass
    with pytest.raises(ValueError, match="tolerance"), watch(model, tolerance=1.0):
        pass
    with pytest.raises(ValueError, match="on_part"), watch(model, on_part="ignore"):  # type: ignore[arg-type]
        pass
    with torch.profiler.profile(), pytest.raises(WatchError, match="profiler"), watch(model):
        model(x).backward()
    assert watching._active is None
    call: Any = planned_call(model)
    monkeypatch.setattr(call.backend, "compiler", "inductor")
    with pytest.raises(WatchError, match="compiled with Inductor"), watch(model):
        pass
    with pytest.raises(WatchError, match="compiled with Inductor"), watch():
        model(x).backward()


def test_blocks() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
    x = torch.ones(4, 8)
    plan_blocks(model, "1GiB", (x,), blocks=["0", "1"], loss_fn=torch.sum).rewrite(model)
    with pytest.raises(WatchError, match="2 planned modules"), watch(model):
        pass
