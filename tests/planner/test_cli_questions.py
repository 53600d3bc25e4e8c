"""The verbs `minimum-budget`, `max-batch`, `certify` and `verify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner import InfeasibleBudgetError
from planner.cli.factory import make_for_batches
from planner.cli.main import CHECK_FAILED, ERROR, INFEASIBLE, OK, main
from planner.errors import FactoryError
from planner.plan_file import Plan
from tests.planner.plans import make_plan

FACTORIES = """
import torch
from tests.planner.test_max_batch_size import Net, inputs

def make():
    return Net(), inputs

def with_loss():
    return torch.nn.Linear(8, 8), inputs, lambda result: result.square().sum()

def plain():
    return Net(), inputs(4)
"""


@pytest.fixture
def plan_path(tmp_path: Path) -> str:
    make_plan().save(tmp_path / "plan.json")
    return str(tmp_path / "plan.json")


@pytest.fixture
def factories(tmp_path: Path) -> str:
    path = tmp_path / "batch_factories.py"
    path.write_text(FACTORIES)
    return str(path)


def data_of(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out)


def test_the_smallest_budget_of_a_plans_graph(plan_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["minimum-budget", plan_path, "--time-limit", "4", "--json"]) == OK
    data = data_of(capsys)
    graph_floor, peak = data["floor_bytes"], data["peak_bytes"]
    assert isinstance(graph_floor, int)
    assert isinstance(peak, int)
    assert graph_floor <= peak <= Plan.load(plan_path).store_all_peak_bytes
    assert "schedule" not in data
    assert main(["minimum-budget", plan_path, "--time-limit", "4"]) == OK
    assert "smallest budget known to work" in capsys.readouterr().out
    assert main(["minimum-budget", plan_path, "--keep", "layers.1"]) == ERROR
    assert "pins and prices are settled" in capsys.readouterr().err


def test_the_smallest_budget_of_a_model(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["minimum-budget", f"{factories}:plain", "--time-limit", "4", "--json"]
    assert main(arguments) == OK
    free = data_of(capsys)["peak_bytes"]
    assert main([*arguments, "--keep", "layers.*"]) == OK
    kept = data_of(capsys)["peak_bytes"]
    assert isinstance(free, int)
    assert isinstance(kept, int)
    assert free <= kept


def test_the_largest_batch(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "p.json")
    arguments = ["max-batch", f"{factories}:make", "--budget", "20KB", "--limit", "8", "--time-limit", "2"]
    assert main([*arguments, "--json", "-o", out]) == OK
    data = data_of(capsys)
    assert (data["batch"], data["limit_reached"], data["output"]) == (8, True, out)
    assert Plan.load(out).budget_bytes == 20_000
    assert main([*arguments, "--multiple-of", "3", "--max-overhead", "20"]) == OK
    text = capsys.readouterr().out
    assert "batch              6 within" in text
    assert "store-all's peak" in text
    assert main(["max-batch", f"{factories}:with_loss", "--budget", "1GiB", "--limit", "2", "--json"]) == OK


def test_no_batch_fits(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["max-batch", f"{factories}:make", "--budget", "100 bytes", "--json"]) == INFEASIBLE
    captured = capsys.readouterr()
    assert json.loads(captured.out)["status"] == "INFEASIBLE"
    assert InfeasibleBudgetError.__name__ not in captured.err
    assert main(["max-batch", f"{factories}:make", "--budget", "60%"]) == ERROR
    assert "give bytes" in capsys.readouterr().err


def test_a_factory_without_make_inputs_says_what_to_return(factories: str) -> None:
    with pytest.raises(FactoryError, match=r"must return \(model, make_inputs\)"):
        make_for_batches(f"{factories}:plain")


def test_certificates(plan_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "c.json")
    assert main(["certify", plan_path, "-o", out, "--json"]) == OK
    made = data_of(capsys)
    assert main(["verify", out, "--json"]) == OK
    read = data_of(capsys)
    assert read["valid"] is True
    assert read["overhead"] == made["overhead"] == Plan.load(plan_path).overhead
    assert main(["verify", out]) == OK
    assert capsys.readouterr().out
    changed = json.loads(Path(out).read_text())
    changed["budget_bytes"] -= 1000
    Path(out).write_text(json.dumps(changed))
    assert main(["verify", out, "--json"]) == CHECK_FAILED
    assert data_of(capsys)["valid"] is False
    assert main(["verify", str(tmp_path / "nothing.json")]) == ERROR
    assert main(["certify", plan_path, "-o", str(tmp_path / "no" / "c.json")]) == ERROR


def test_a_plan_with_pins_can_be_certified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from planner import plan
    from tests.planner.test_max_batch_size import SOLVER, Net, inputs

    plan(Net(), "400%", inputs(8), recompute=["layers.1"], keep=["layers.2"], solver=SOLVER).save(tmp_path / "p.json")
    assert main(["certify", str(tmp_path / "p.json"), "-o", str(tmp_path / "c.json"), "--json"]) == OK
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "c.json")]) == OK


def test_memory_beside_the_step(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "p.json")
    extra = ["--extra", "optimizer state=1MiB", "--extra", "a=b=2KiB"]
    assert main(["plan", f"{factories}:plain", "--budget", "4MiB", *extra, "-o", out]) == OK
    assert "1.00 MiB  optimizer state" in capsys.readouterr().out
    resident = Plan.load(out).to_graph().resident_bytes
    assert (resident["optimizer state"], resident["a=b"]) == (2**20, 2**11)
    assert main(["minimum-budget", out, "--extra", "x=1KiB"]) == ERROR
    assert main(["plan", f"{factories}:plain", "--budget", "4MiB", "--extra", "parameters=1KiB"]) == ERROR
    assert "counted from the model itself" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["headroom", "headroom=3", "headroom=10%", "=3GiB", "headroom=-1GiB"])
def test_memory_beside_the_step_needs_a_label_and_a_size(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", "x.py:f", "--budget", "1GiB", "--extra", written])
    assert end.value.code == ERROR
    assert "--extra" in capsys.readouterr().err
