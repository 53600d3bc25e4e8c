"""`examples/benchmarks/cost_model.py` on a graph made here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.solvers.random_graphs import training_chain


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "benchmarks" / "cost_model.py"
    spec = importlib.util.spec_from_file_location("cost_model_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_perturbed_seconds(benchmark: ModuleType) -> None:
    graph = training_chain(20, seconds=2.0)
    first, again, other = (benchmark.perturbed(graph, 0.2, seed) for seed in (0, 0, 1))
    assert [o.seconds for o in first.operators] == [o.seconds for o in again.operators]
    assert [o.seconds for o in first.operators] != [o.seconds for o in other.operators]
    assert all(1.6 <= o.seconds <= 2.4 for o in first.operators)
    assert first.fingerprint == graph.fingerprint


def test_table(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A schedule chosen on wrong seconds costs no less than the bound for the true ones."""
    path = tmp_path / "chain.json"
    path.write_text(json.dumps(training_chain(8).to_dict()))
    assert benchmark.main([str(path), "--budgets", "0.8", "--seeds", "2"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    right, mean, worst, bound, gap, failures = map(float, row[-6:])
    assert bound <= right <= worst
    assert mean <= worst
    assert gap == pytest.approx(worst - bound, abs=2e-3)
    assert failures == 0
