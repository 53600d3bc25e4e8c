"""The generator of `examples/benchmarks/layered_graphs.py` against the graphs that the papers used."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PAPERS = {(100, 0.27): (21, 9, 236), (500, 0.36): (33, 29, 2461), (1000, 0.31): (51, 36, 5875)}
"""(operators, width): layers, largest layer and edges of Moccasin's instance; 14 % of the edges skip a layer."""


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "benchmarks" / "layered_graphs.py"
    spec = importlib.util.spec_from_file_location("layered_graphs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layered_graphs"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("n", "width"), PAPERS)
def test_statistics(benchmark: ModuleType, n: int, width: float) -> None:
    layers, largest, edges = PAPERS[n, width]
    drawn = [benchmark.layered_graph(n, seed, width) for seed in range(12)]
    assert sum(len(g.layers) for g in drawn) / len(drawn) == pytest.approx(layers, rel=0.2)
    for graph in drawn:
        assert sorted(i for layer in graph.layers for i in layer) == list(range(n))
        assert len(graph.layers[0]) == len(graph.layers[-1]) == 1
        assert max(map(len, graph.layers)) <= largest * 1.15 + 1
        skips = len(graph.skip_edges)
        assert skips + len(graph.neighbour_edges) == pytest.approx(edges, rel=0.2)
        assert skips / (skips + len(graph.neighbour_edges)) == pytest.approx(0.14, abs=0.01)
        layer_of = {i: number for number, layer in enumerate(graph.layers) for i in layer}
        assert all(layer_of[b] - layer_of[a] == 1 for a, b in graph.neighbour_edges)
        assert all(layer_of[b] - layer_of[a] >= 2 for a, b in graph.skip_edges)


def test_prices(benchmark: ModuleType) -> None:
    graph = benchmark.graph_of(benchmark.layered_graph(1000, 0), 0)
    sizes = [v.size_bytes for v in graph.values]
    assert min(sizes) >= 0
    assert sum(sizes) / len(sizes) == pytest.approx(2000, rel=0.25)
    assert 900 < max(o.seconds for o in graph.operators) <= 999
    assert graph == benchmark.graph_of(benchmark.layered_graph(1000, 0), 0)


def test_table(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--size", "40", "--moves", "20000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[2:5]] == ["local-search"] * 3
    assert lines[-1].endswith("solves without a schedule")
