"""Random layered graphs (Gagrani et al., NeurIPS 2022, appendix A): how much a better order and recomputation give.

    python examples/benchmarks/layered_graphs.py                        # graphs made here: 100, 500, 1000 operators
    python examples/benchmarks/layered_graphs.py --instances DIRECTORY  # the graphs that the papers used

These graphs have no backward pass: any operator may run again, and the order is free. Budgets are fractions of the peak
of the given order: 0.9 and 0.8, and 0.7 for 100 operators. Beside the overheads stand the figures that the FastSA
paper (Imanishi et al., NeurIPS 2023) gives for itself and for Moccasin (Bartan et al., ICML 2023), on its own machine
and for its own instances: comparable for the papers' graphs only. The bound is a solver's claim for one order of first
executions (in its message); over all orders none but 0 is known. Work is limited by moves, so overheads are the same on
every machine; seconds are wall-clock and CPU.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import random
import runpy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from graph_capture.graph import Graph, Operator, Value
from solvers import LocalSearch, Reordered, Schedule, Solver, simulate

WIDTHS = (0.25, 0.5)
SPREAD = 0.75
EDGE_DENSITY = 0.2
SKIP_SHARE = 0.14
SIZE_MEANS, SIZE_DEVIATIONS = (0.5, 1.0, 3.0, 5.0), (0.5, 1.0, 1.0, 1.0)

PUBLISHED = {
    (100, 0.9): "0.0 / 11.7    0.8 / 9.3",
    (100, 0.8): "0.3 / 11.5    2.3 / 9.5",
    (100, 0.7): "2.2 / 12.0    -",
    (500, 0.9): "0.03 / 21.0   0.7 / 1803",
    (500, 0.8): "2.3 / 20.9    3.4 / 1805",
    (1000, 0.9): "0.4 / 36.0    0.7 / 3613",
    (1000, 0.8): "2.5 / 36.3    3.4 / 3612",
}
"""(operators, budget): overhead in percent / seconds of FastSA, and of Moccasin."""


@dataclass(frozen=True)
class LayeredGraph:
    """A random layered graph: the operators of each layer, and edges (from, to) between layers."""

    layers: tuple[tuple[int, ...], ...]
    neighbour_edges: tuple[tuple[int, int], ...]
    skip_edges: tuple[tuple[int, int], ...]
    width: float


def layered_graph(n: int, seed: int, width: float | None = None) -> LayeredGraph:
    """Draw the structure of a graph of `n` operators, numbered layer by layer; `width` is drawn if it is not given."""
    rng = random.Random(seed)
    width = rng.uniform(*WIDTHS) if width is None else width
    layers = _layers(n, width, rng)
    neighbours = [edge for one, other in itertools.pairwise(layers) for edge in _between(one, other)]
    wanted = math.ceil(len(neighbours) * SKIP_SHARE / (1 - SKIP_SHARE))
    skips: set[tuple[int, int]] = set()
    while len(skips) < wanted:
        first = rng.randrange(len(layers) - 2)
        second = rng.randrange(first + 2, len(layers))
        skips.add((rng.choice(layers[first]), rng.choice(layers[second])))
    return LayeredGraph(tuple(map(tuple, layers)), tuple(neighbours), tuple(sorted(skips)), width)


def _layers(n: int, width: float, rng: random.Random) -> list[list[int]]:
    count = math.ceil(math.sqrt(n * (1 / width - 1)))
    low, high = math.ceil(n / count * (1 - SPREAD)), math.floor(n / count * (1 + SPREAD))
    sizes = [1]
    while sum(sizes) < n - 1:
        sizes.append(min(rng.randint(max(1, low), max(1, high)), n - 1 - sum(sizes)))
    sizes.append(1)
    layers: list[list[int]] = []
    for size in sizes:
        start = sum(len(layer) for layer in layers)
        layers.append(list(range(start, start + size)))
    return layers


def _between(one: Sequence[int], other: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Edges between neighbouring layers: as many for each operator of the larger one, around its place in the other."""
    edges = math.floor(EDGE_DENSITY * len(one) * len(other) + (1 - EDGE_DENSITY) * max(len(one), len(other)))
    large, small = (one, other) if len(one) >= len(other) else (other, one)
    share, extra = divmod(edges, len(large))
    for index, operator in enumerate(large):
        count = min(len(small), share + (index < extra))
        middle = (index + 0.5) * len(small) / len(large)
        start = min(max(0, round(middle - count / 2)), len(small) - count)
        for partner in small[start : start + count]:
            yield (operator, partner) if large is one else (partner, operator)


def graph_of(layered: LayeredGraph, seed: int) -> Graph:
    """The graph with sizes (a mixture of Gaussians, times 1000 bytes) and durations (uniform in 0..999)."""
    rng = random.Random(f"prices {seed}")
    n = sum(len(layer) for layer in layered.layers)
    inputs: list[set[int]] = [set() for _ in range(n)]
    for source, target in (*layered.neighbour_edges, *layered.skip_edges):
        inputs[target].add(source)
    operators = tuple(
        Operator(f"o{i}", "node", "forward", tuple(sorted(inputs[i])), (i,), float(rng.randint(0, 999)))
        for i in range(n)
    )
    return Graph(operators, tuple(Value(_size_bytes(rng), i) for i in range(n)), name=f"layered {n}, seed {seed}")


def _size_bytes(rng: random.Random) -> int:
    kind = rng.randrange(len(SIZE_MEANS))
    while (size := rng.gauss(SIZE_MEANS[kind], SIZE_DEVIATIONS[kind])) <= 0:
        pass
    return int(1000 * size)


def _graphs(options: argparse.Namespace) -> Iterator[Graph]:
    if options.instances is None:
        for n in options.size or [100, 500, 1000]:
            yield graph_of(layered_graph(n, options.seed), options.seed)
        return
    instances = runpy.run_path(str(Path(__file__).with_name("paper_graphs.py")))["instances"]
    yield from sorted((g for g in instances(options.instances) if g.name.startswith("random_layered")), key=len)


def _solvers(options: argparse.Namespace) -> list[Solver]:
    moves = options.moves
    limit = 600.0  # only to end it at all
    search = LocalSearch(time_limit_seconds=limit, move_limit=moves, seed=options.seed)
    return [search, Reordered(time_limit_seconds=options.time_limit, seed=options.seed)] if options.bound else [search]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--instances", type=Path, help="directory or file of the papers' instances")
    parser.add_argument("--size", action="append", type=int, help="operators (default: 100, 500 and 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of graphs and searches (default: 0)")
    parser.add_argument("--moves", type=int, default=1_200_000, help="moves of local search (default: 1,200,000)")
    parser.add_argument("--bound", action="store_true", help="run Reordered, too, which reports a bound per order")
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds of Reordered (default: 30)")
    options = parser.parse_args(arguments)
    print(f"{platform.machine()}, Python {platform.python_version()}; {options.moves:,} moves; one thread")
    print(
        f"{'n':>5}{'budget':>7}  {'solver':<13}{'overhead %':>10}{'wall s':>8}{'CPU s':>8}  published: FastSA, Moccasin"
    )
    failures = 0
    for graph in _graphs(options):
        peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
        for fraction in (0.9, 0.8, 0.7) if len(graph) <= 100 else (0.9, 0.8):
            for solver in _solvers(options):
                cpu = time.process_time()
                solution = solver.solve(graph, int(fraction * peak_bytes))
                cpu = time.process_time() - cpu
                failures += solution.schedule is None
                overhead = f"{100 * solution.overhead:.3f}" if solution.schedule else "none"
                known = PUBLISHED.get((len(graph), fraction), "") if options.instances else ""
                seconds = f"{solution.seconds:>8.1f}{cpu:>8.1f}"
                print(f"{len(graph):>5}{fraction:>7.2f}  {solver.name:<13}{overhead:>10}{seconds}  {known}", flush=True)
                if solution.message:
                    print(f"{'':>14}{solution.message}")
    print(f"{failures} solves without a schedule")
    return 0


if __name__ == "__main__":
    sys.exit(main())
