"""Snapshot refinement on graphs from files: overhead, lower bound, gap and time for each budget.

    python examples/benchmarks/snapshot_refinement.py graph.json --budgets 0.8,0.5,0.3 --time-limit 30

Reads three formats: ``Graph.to_dict`` as JSON, joint graphs with `ops` and `storages`, and the public benchmark graphs
with `edges`, `cost`, `mem` and `order`. Budgets are fractions of the store-all peak. Failures are counted, not hidden.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graph_capture.graph import Graph, Operator, Phase, Value
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.snapshot import SnapshotRefinement
from solvers.solution import Solution


def from_storages(data: Mapping[str, Any], name: str = "") -> Graph:
    """A joint graph of operators and storages; backward operators are not repeatable, inputs are not counted."""
    number: dict[int, int] = {}
    values: list[Value] = []
    results = set(data["outputs"])
    for index, row in enumerate(data["ops"]):
        for storage in row["outs"]:
            number[storage] = len(values)
            # statistics next to a forward operator's result are written into buffers, not handed to the caller
            statistics = row["fw"] and len(row["outs"]) > 1
            kind = "output" if storage in results and not statistics else "activation"
            values.append(Value(size_bytes=data["storages"][storage]["bytes"], producer=index, kind=kind))
    operators = [
        Operator(
            name=f"{index}_{row['name']}",
            target=row["target"],
            phase="forward" if row["fw"] else "backward",
            inputs=tuple(dict.fromkeys(number[s] for s in row["ins"] if s in number)),
            outputs=tuple(number[s] for s in row["outs"]),
            seconds=row["cost"],
            flops=row["flops"],
            recomputable=bool(row["fw"]),
        )
        for index, row in enumerate(_phases_in_order(data["ops"]))
    ]
    return Graph(operators=tuple(operators), values=tuple(values), name=name)


def _phases_in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An operator marked forward behind the first backward one counts as backward in phase."""
    behind = False
    ordered = []
    for row in rows:
        behind = behind or not row["fw"]
        ordered.append({**row, "fw": row["fw"] and not behind})
    return ordered


def from_edges(data: Mapping[str, Any], name: str = "") -> Graph:
    """A public benchmark graph: one value per node, every node repeatable, in the order given."""
    order = data["order"]
    position = {node: p for p, node in enumerate(order)}
    inputs: list[list[int]] = [[] for _ in order]
    for source, target in data["edges"]:
        inputs[position[target]].append(position[source])
    total = sum(data["cost"])
    phase: Phase = "forward"
    operators = tuple(
        Operator(
            name=f"node_{node}",
            target="node",
            phase=phase,
            inputs=tuple(sorted(set(inputs[p]))),
            outputs=(p,),
            seconds=data["cost"][node] / total,
        )
        for p, node in enumerate(order)
    )
    values = tuple(Value(size_bytes=int(data["mem"][node]), producer=p) for p, node in enumerate(order))
    return Graph(operators=operators, values=values, name=name)


def load(path: Path) -> Graph:
    """The graph in a file, whichever of the three formats it has."""
    data = json.loads(path.read_text())
    if "storages" in data:
        return from_storages(data, path.stem)
    if "edges" in data:
        return from_edges(data, path.stem)
    return Graph.from_dict(data)


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    graph: Graph
    fraction: float
    solution: Solution

    def __str__(self) -> str:
        s = self.solution
        figures = f"{100 * s.overhead:8.3f} {100 * s.lower_bound:8.3f} {100 * s.gap:7.3f} {s.seconds:7.2f}"
        return f"{self.graph.name[:32]:32} {len(self.graph):5} {self.fraction:6.3f} {figures}  {s.status.name}"


def main() -> int:
    """Run the benchmark; the exit status is the number of budgets with neither a schedule nor a proof, at most 99."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", nargs="+", type=Path)
    parser.add_argument("--budgets", default="0.8,0.6,0.5,0.4,0.3")
    parser.add_argument("--time-limit", type=float, default=30.0)
    parser.add_argument("--gap", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", default="HIGHS")
    parser.add_argument("--trace", action="store_true", help="print the events of each solve")
    options = parser.parse_args()
    solver = SnapshotRefinement(
        time_limit_seconds=options.time_limit,
        gap=options.gap,
        seed=options.seed,
        engines=tuple(options.engines.split(",")),
    )
    print(f"# {platform.machine()}, {platform.system()}, Python {platform.python_version()}; {solver}")
    print(f"{'graph':32} {'ops':>5} {'budget':>6} {'over %':>8} {'bound %':>8} {'gap':>7} {'seconds':>7}  status")
    failures = 0
    for path in options.graphs:
        graph = load(path)
        peak = simulate(graph, Schedule.store_all(graph)).peak_bytes
        for fraction in map(float, options.budgets.split(",")):
            solution = solver.solve(graph, int(fraction * peak))
            print(Row(graph, fraction, solution), flush=True)
            if options.trace:
                print(*(f"    {line}" for line in solution.trace), solution.message, sep="\n", flush=True)
            failures += solution.status.name == "UNKNOWN"
    print(f"# {failures} budgets with neither a schedule nor a proof")
    return min(failures, 99)


if __name__ == "__main__":
    sys.exit(main())
