"""Every solver on every benchmark graph at every budget: overhead, lower bound, gap, seconds, and failures counted.

    python examples/benchmarks/solver_table.py --graphs GRAPHS --instances INSTANCES --out table.md

GRAPHS is the folder of :mod:`suite` (missing graphs are captured into it): joint graphs of real models, at fractions of
the store-all peak of what a schedule can change (parameters and inputs, which no schedule changes, are left out).
INSTANCES holds the public graphs of the papers (see ``paper_graphs.py``), at fractions of `peak_of_order`.
With ``--smallest SECONDS`` each graph is also solved at the smallest budget that `minimum_budget` finds in that time,
from the schedule that it found.

Overhead, bound and gap are in percent of the store-all step. A bound in brackets speaks of the solver's own, narrower
class of schedules. A solver that does not apply, refuses the size, proves that nothing fits or finds nothing is a row
with its reason; the last lines count them.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from paper_graphs import instances
from suite import MODELS, load

from graph_capture.graph import Graph
from solvers import SOLVERS, Schedule, SearchClass, Solution, Solver, Status, simulate, solver_class
from solvers.hints import NO_HINTS, Hints
from solvers.minimum_budget import minimum_budget

DEFAULT_SOLVERS = ("auto", "chen-greedy", "chen-sqrt", "revolve", "heterogeneous-chain", "staged", "checkmate-rounding")
SMALL_SOLVERS = ("checkmate", "moccasin")
SMALL_OPERATORS = 360
WHOLE_CLASS = (SearchClass.ORDERED, SearchClass.MIXED, SearchClass.STORE_ALL)


def _solver(name: str, time_limit_seconds: float) -> Solver:
    made = solver_class(name)()
    if any(f.name == "time_limit_seconds" for f in dataclasses.fields(made)):  # type: ignore[arg-type]
        return dataclasses.replace(made, time_limit_seconds=time_limit_seconds)  # type: ignore[type-var]
    return made


def _graphs(options: argparse.Namespace) -> Iterator[tuple[Graph, str, list[float]]]:
    if options.instances is not None:
        for graph in instances(options.instances):
            yield graph, graph.name, options.paper_budgets
    if options.graphs is not None:
        for name in options.models:
            graph = load(options.graphs, name)
            yield dataclasses.replace(graph, resident_bytes={}), name, options.budgets


def _figures(solution: Solution) -> str:
    if solution.schedule is None:
        return f"{'-':>9} | {'-':>9} | {'-':>7}"
    bound = f"{100 * solution.lower_bound:.3f}"
    if solution.search_class not in WHOLE_CLASS:
        bound = f"({bound})"
    return f"{100 * solution.overhead:9.3f} | {bound:>9} | {100 * solution.gap:7.3f}"


def _outcome(solution: Solution) -> str:
    if solution.schedule is not None:
        return solution.status.name
    return f"{solution.status.name}: {solution.message.split(';')[0][:110]}"


def main() -> None:
    """Print the table, and write it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=Path)
    parser.add_argument("--instances", type=Path)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--budgets", nargs="*", type=float, default=[0.8, 0.6, 0.5, 0.4, 0.3, 0.2])
    parser.add_argument("--paper-budgets", nargs="*", type=float, default=[0.9, 0.8])
    parser.add_argument("--solvers", nargs="*", default=[*DEFAULT_SOLVERS, *SMALL_SOLVERS])
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds, of the solvers that have a limit")
    parser.add_argument("--smallest", type=float, help="seconds to look for the smallest budget that works")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    unknown = set(options.solvers) - set(SOLVERS)
    if unknown:
        parser.error(f"there are no solvers {sorted(unknown)}; there are {', '.join(SOLVERS)}")
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if options.out is not None:
            options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    say(f"{datetime.date.today()}, {machine}; time limit {options.time_limit:g} s\n")
    say("| graph | operators | budget | solver | overhead % | bound % | gap % | seconds | outcome |")
    say("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for graph, name, budgets in _graphs(options):
        peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
        sizes = [(f"{fraction:g}", math.floor(fraction * peak_bytes), NO_HINTS) for fraction in budgets]
        if options.smallest is not None:
            least = minimum_budget(graph, time_limit_seconds=options.smallest)
            within = f"smallest >= {least.lower_bound_bytes / peak_bytes:.4f}"
            known = Hints(schedules=(least.schedule,))
            sizes.append((f"{least.peak_bytes / peak_bytes:.4f} ({within})", least.peak_bytes, known))
        for budget, budget_bytes, hints in sizes:
            for solver_name in options.solvers:
                if solver_name in SMALL_SOLVERS and len(graph) > SMALL_OPERATORS:
                    counts[solver_name, "left out for size"] += 1
                    continue
                began = time.perf_counter()
                solution = _solver(solver_name, options.time_limit).solve(graph, budget_bytes, hints)
                seconds = time.perf_counter() - began
                counts[solver_name, solution.status.name] += 1
                if solution.status is Status.NOT_APPLICABLE:
                    continue
                say(
                    f"| {name} | {len(graph)} | {budget} | {solver_name} | {_figures(solution)} | {seconds:.1f} "
                    f"| {_outcome(solution)} |"
                )
    say("\n| solver | outcome | cases |\n| --- | --- | --- |")
    for (solver_name, outcome), count in sorted(counts.items()):
        say(f"| {solver_name} | {outcome} | {count} |")


if __name__ == "__main__":
    main()
