"""The largest batch: found, proven, with its plan, without allocating anything."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from planner import (
    BudgetError,
    CaptureError,
    InfeasibleBudgetError,
    MaxBatchSize,
    NoScheduleError,
    max_batch_size,
    plan,
    rewrite,
)
from planner.max_batch_size import call_of
from solvers import SnapshotRefinement, StoreAll
from solvers.simulator import simulate_store_all

SOLVER = SnapshotRefinement(work_limit=2, gap=1e-2)
WIDTH = 8


class Net(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def inputs(batch: int) -> tuple[torch.Tensor]:
    return (torch.zeros(batch, WIDTH),)


def peak_of(batch: int) -> int:
    """Bytes of the step without recomputation."""
    return simulate_store_all(plan(Net(), "400%", inputs(batch), solver=StoreAll()).to_graph()).peak_bytes


@pytest.fixture(scope="module")
def budget_bytes() -> int:
    return peak_of(40)


@pytest.fixture(scope="module")
def found(budget_bytes: int) -> MaxBatchSize:
    return max_batch_size(Net(), budget_bytes, inputs, solver=SOLVER)


def test_it_is_larger_than_store_all_and_its_plan_fits(found: MaxBatchSize, budget_bytes: int) -> None:
    assert found.store_all_batch == 40
    assert found.batch > 40
    assert found.plan.predicted_peak_bytes <= budget_bytes
    assert found.plan.budget_bytes == found.budget_bytes == budget_bytes
    assert f"[{found.batch}, {WIDTH}]" in str([row.describe() for row in found.plan.inputs])
    assert not found.limit_reached


def test_it_is_printed_as_an_answer_and_a_table(found: MaxBatchSize) -> None:
    text = str(found)
    assert text.startswith(f"batch              {found.batch} within ")
    assert len(text.split("\n\n")[1].splitlines()) == 1 + len(found.trials)


def test_the_next_larger_batch_was_tried_and_does_not_fit(found: MaxBatchSize) -> None:
    by_batch = {trial.batch: trial for trial in found.trials}
    beyond = by_batch[found.batch + 1]
    assert not beyond.fits
    assert found.proven == (beyond.outcome == "impossible")
    assert list(by_batch) == sorted(by_batch)
    assert found.trial.fits
    assert found.trial.overhead == pytest.approx(found.plan.overhead)


def test_throughput_is_by_the_cost_model(found: MaxBatchSize) -> None:
    step = found.plan.step_seconds * (1 + found.plan.overhead)
    assert found.trial.samples_per_second == pytest.approx(found.batch / step)
    best = max(t.samples_per_second or 0 for t in found.trials if t.fits)
    assert found.fastest.samples_per_second == best
    for trial in found.trials:
        assert (trial.samples_per_second is None) == (trial.overhead is None)


def test_the_plan_runs(found: MaxBatchSize) -> None:
    torch.manual_seed(0)
    model = rewrite(Net(), found.plan, on_change="error")
    model(torch.ones(found.batch, WIDTH)).backward()


def test_max_overhead_multiple_and_limit(budget_bytes: int) -> None:
    none = max_batch_size(Net(), budget_bytes, inputs, solver=SOLVER, max_overhead=0.0)
    assert none.batch == none.store_all_batch == 40
    assert none.plan.overhead == 0.0
    sevens = max_batch_size(Net(), budget_bytes, inputs, solver=SOLVER, multiple_of=7)
    assert sevens.batch % 7 == 0
    assert all(trial.batch % 7 == 0 for trial in sevens.trials)
    assert sevens.store_all_batch == 35
    limited = max_batch_size(Net(), budget_bytes, inputs, solver=SOLVER, limit=20)
    assert (limited.batch, limited.limit_reached, limited.proven) == (20, True, False)
    assert limited.store_all_batch == 20


def test_the_fastest_may_be_preferred(budget_bytes: int) -> None:
    fastest = max_batch_size(Net(), budget_bytes, inputs, solver=SOLVER, prefer="fastest")
    assert fastest.batch == fastest.fastest.batch
    assert fastest.plan.predicted_peak_bytes <= budget_bytes


def test_pins_are_obeyed(budget_bytes: int) -> None:
    kept = max_batch_size(Net(), budget_bytes, inputs, solver=SOLVER, keep="layers.*")
    assert kept.plan.pins.keep == ("layers.*",)
    assert kept.batch <= 41


def test_inputs_are_fake_and_the_random_state_stays(budget_bytes: int) -> None:
    kinds: list[str] = []

    def make(batch: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        x = torch.randn(batch, WIDTH)
        kinds.append(type(x).__name__)
        return [], {"x": x}

    model = Net()
    state = torch.get_rng_state()
    max_batch_size(model, budget_bytes, make, solver=SOLVER, limit=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(kinds) == {"FakeTensor"}


def test_inputs_that_need_data_are_made_for_real(budget_bytes: int) -> None:
    def make(batch: int) -> torch.Tensor:
        x = torch.ones(batch, WIDTH)
        return x * x.sum().item()

    assert max_batch_size(Net(), budget_bytes, make, solver=SOLVER, limit=2).batch == 2


def test_a_model_of_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = Net()
    assert max_batch_size(model, "1GiB", inputs, solver=SOLVER, limit=8).batch == 8


def test_forms_of_inputs() -> None:
    assert call_of(3) == ((3,), {})
    assert call_of((3, 4)) == ((3, 4), {})
    assert call_of({"x": 3}) == ((), {"x": 3})
    assert call_of(((3,), {"y": 4})) == ((3,), {"y": 4})
    assert call_of((3, {"y": 4})) == ((3, {"y": 4}), {})


def test_bad_input(budget_bytes: int) -> None:
    with pytest.raises(BudgetError, match="grows with the batch: give bytes"):
        max_batch_size(Net(), "60%", inputs)
    with pytest.raises(InfeasibleBudgetError, match="no schedule fits the budget"):
        max_batch_size(Net(), 100, inputs, solver=SOLVER)
    with pytest.raises(NoScheduleError, match=r"max_overhead is 0.00%"):
        max_batch_size(Net(), budget_bytes, inputs, solver=SOLVER, max_overhead=0.0, multiple_of=41)
    with pytest.raises(CaptureError, match=r"batch 1: .*eval mode"):
        max_batch_size(Net().eval(), budget_bytes, inputs)
    for options in ({"max_overhead": -1.0}, {"multiple_of": 0}, {"limit": 0}, {"prefer": "best"}):
        with pytest.raises(ValueError, match=r"must be|give a fraction"):
            max_batch_size(Net(), budget_bytes, inputs, **options)  # type: ignore[arg-type]


def test_the_result_is_plain_data(found: MaxBatchSize) -> None:
    json.dumps([dataclasses.asdict(trial) for trial in found.trials])
