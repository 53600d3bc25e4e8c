"""Runs solvers on the benchmark graphs of the rematerialization papers and prints a table.

    python examples/benchmarks/paper_graphs.py INSTANCES --solver auto --solver checkmate --budget 0.9 --budget 0.8

INSTANCES is a directory of JSON files (or one file) with ``n`` nodes, ``edges`` [from, to], ``cost`` and ``mem`` (bytes
of a node's output) per node, ``order`` (a topological order), ``is_backward`` per node or null, ``peak_of_order`` (the
peak when nothing is recomputed in that order). Budgets are fractions of that peak, as in the papers. Checkmate's
training graphs and Moccasin's random layered graphs have this form; a file without these fields is passed over.

Every node may be recomputed, and nothing is resident. The overhead is the papers' "cost increase" in percent; the
bound is the solver's own, in the same unit and for the class of schedules that it searches ("-": it has none, "inf":
proven infeasible). A run that finds nothing is a row of the table, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graph_capture.graph import Graph, Operator, Value
from solvers import SOLVERS, Schedule, SearchClass, Solution, Solver, simulate, solver_class

_FIELDS = {"n", "edges", "cost", "mem", "order"}


def graph_of(data: Mapping[str, Any], name: str) -> Graph:
    """Convert one instance; its nodes become operators in the instance's order, with one value each."""
    place = {node: index for index, node in enumerate(data["order"])}
    inputs: list[list[int]] = [[] for _ in range(data["n"])]
    for source, target in data["edges"]:
        inputs[place[target]].append(place[source])
    backward = data.get("is_backward") or [False] * data["n"]
    # A forward node behind a backward one in the order would be out of phase; such graphs have one phase only.
    phases = [bool(backward[node]) for node in data["order"]]
    two_phases = phases == sorted(phases)
    names = data.get("node_names") or [str(node) for node in range(data["n"])]
    operators = tuple(
        Operator(
            name=f"{names[node]}.{node}",
            target="node",
            phase="backward" if two_phases and backward[node] else "forward",
            inputs=tuple(sorted(set(inputs[index]))),
            outputs=(index,),
            seconds=float(data["cost"][node]),
        )
        for index, node in enumerate(data["order"])
    )
    values = tuple(Value(int(data["mem"][node]), index) for index, node in enumerate(data["order"]))
    return Graph(operators, values, name=name)


def instances(path: Path) -> Iterator[Graph]:
    """The graphs of a directory or of one file, in the order of their names."""
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        data = json.loads(file.read_text())
        if isinstance(data, dict) and data.keys() >= _FIELDS:
            yield graph_of(data, file.stem)


def configured(name: str, time_limit_seconds: float) -> Solver:
    """A solver by name, with the time limit if it has one."""
    kind = solver_class(name)
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    return kind(time_limit_seconds=time_limit_seconds) if "time_limit_seconds" in fields else kind()


def row(graph: Graph, fraction: float, name: str, solution: Solution) -> str:
    """One line of the table."""
    percent = [_percent(solution.overhead), _percent(solution.lower_bound), _percent(solution.gap)]
    boundless = SOLVERS[name].search_class in (SearchClass.STORE_ALL, SearchClass.PERSISTENT_CHAIN)
    if boundless and solution.lower_bound == 0:
        percent[1:] = ["-", "-"]
    cells = "".join(f"{cell:>9}" for cell in percent)
    status = solution.status.name.lower() + (" (limit)" if solution.hit_limit else "")
    return f"{graph.name[:34]:<36}{len(graph):>5}{fraction:>7.2f}  {name:<12}{cells}{solution.seconds:>8.2f}  {status}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3f}" if math.isfinite(fraction) else "inf"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("instances", type=Path, help="directory or file of instances")
    parser.add_argument("--solver", action="append", help=f"one of {', '.join(SOLVERS)} (default: auto)")
    parser.add_argument("--budget", action="append", type=float, help="fraction of the peak (default: 0.9 and 0.8)")
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds per solve (default: 30)")
    parser.add_argument("--only", default="", help="only instances whose name contains this")
    options = parser.parse_args(arguments)
    solvers = {name: configured(name, options.time_limit) for name in options.solver or ["auto"]}
    print(f"{platform.machine()}, Python {platform.python_version()}; time limit {options.time_limit:g} s per solve")
    header = "".join(f"{title:>9}" for title in ("overhead", "bound", "gap"))
    print(f"{'graph':<36}{'n':>5}{'budget':>7}  {'solver':<12}{header}{'seconds':>8}  status")
    failures = 0
    for graph in instances(options.instances):
        if options.only not in graph.name:
            continue
        peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
        for fraction in options.budget or [0.9, 0.8]:
            for name, solver in solvers.items():
                solution = solver.solve(graph, int(fraction * peak_bytes))
                failures += solution.schedule is None
                print(row(graph, fraction, name, solution), flush=True)
    print(f"{failures} solves without a schedule")
    return 0


if __name__ == "__main__":
    sys.exit(main())
