"""The converter and the table of `examples/benchmarks/paper_graphs.py`, on an instance made here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from solvers import Schedule, simulate

INSTANCE = {
    "n": 4,
    "edges": [[2, 0], [2, 3], [0, 1], [3, 1]],
    "cost": [5, 7, 1, 2],
    "mem": [10, 1, 4, 3],
    "order": [2, 0, 3, 1],
    "is_backward": [False, True, False, True],
    "peak_of_order": 17,
}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "benchmarks" / "paper_graphs.py"
    spec = importlib.util.spec_from_file_location("paper_graphs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_converter(benchmark: ModuleType) -> None:
    graph = benchmark.graph_of(INSTANCE, "tiny")
    assert [o.seconds for o in graph.operators] == [1.0, 5.0, 2.0, 7.0]
    assert [o.inputs for o in graph.operators] == [(), (0,), (0,), (1, 2)]
    assert [o.phase for o in graph.operators] == ["forward", "forward", "backward", "backward"]
    assert simulate(graph, Schedule.store_all(graph)).peak_bytes == INSTANCE["peak_of_order"]


def test_table(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(INSTANCE))
    (tmp_path / "other.json").write_text("[]")
    assert benchmark.main([str(tmp_path), "--solver", "store-all", "--solver", "checkmate", "--budget", "1.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines[2:4]] == ["store-all", "checkmate"]
    assert lines[-1] == "0 solves without a schedule"
