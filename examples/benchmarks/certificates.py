"""How much of a solver's lower bound its certificate proves, what making and verifying it takes, and its size.

    python examples/benchmarks/certificates.py graph.json --budgets 0.8,0.6,0.5 --time-limit 10

Reads what :mod:`snapshot_refinement` (beside this file) reads. Each row: the overhead and the bound that snapshot
refinement reports, the bound that the certificate's linear relaxation proves, the bound that its branch tree proves
("-" where the linear one reaches the solver's), all in percent of the store-all step and rounded down by the verifier;
leaves, seconds to make and to verify, megabytes of the file. Every certificate is written, read back and verified from
the file; one that is refused is counted.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

from snapshot_refinement import load

from graph_capture.graph import Graph
from planner import CertificateError, CertificateReport, certify, verify_certificate
from solvers import Schedule, SnapshotRefinement, Solution, simulate

HEADER = ("graph", "ops", "budget", "over %", "solver %", "linear %", "tree %", "missing", "leaves", "make", "verify")


def measured(
    graph: Graph, budget_bytes: int, solution: Solution, path: Path, time_limit_seconds: float, leaf_limit: int
) -> tuple[CertificateReport, float, float]:
    """The verifier's report on a certificate that went through a file, and the seconds to make and to verify it."""
    began = time.perf_counter()
    certificate = certify(graph, budget_bytes, solution, time_limit_seconds=time_limit_seconds, leaf_limit=leaf_limit)
    certificate.save(path)
    made = time.perf_counter()
    report = verify_certificate(path)
    return report, made - began, time.perf_counter() - made


def row(graph: Graph, fraction: float, report: CertificateReport, make: float, verify: float, path: Path) -> str:
    """One line of the table."""
    overhead = "-" if report.overhead is None else f"{100 * report.overhead:.4f}"
    tree = "-" if report.integer_bound is None else f"{100 * report.integer_bound:.4f}"
    missing = max(0.0, report.solver_bound - report.bound) if report.bound < report.solver_bound else 0.0
    figures = f"{overhead:>9} {100 * report.solver_bound:9.4f} {100 * report.linear_bound:9.4f} {tree:>9}"
    effort = f"{report.leaves:6} {make:7.2f} {verify:7.2f} {path.stat().st_size / 1e6:6.2f}"
    return f"{graph.name[:24]:24} {len(graph):5} {fraction:6.2f} {figures} {100 * missing:8.4f} {effort}"


def main() -> int:
    """Run the benchmark; the exit status is the number of certificates that were not made or refused, at most 99."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("graphs", nargs="+", type=Path)
    parser.add_argument("--budgets", default="0.8,0.6,0.5")
    parser.add_argument("--solver-time-limit", type=float, default=30.0)
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds to look for a proof (default: 10)")
    parser.add_argument("--leaves", type=int, default=500, help="largest branch tree (default: 500)")
    options = parser.parse_args()
    print(f"# {platform.machine()}, Python {platform.python_version()}; {vars(options)}")
    print("{:24} {:>5} {:>6} {:>9} {:>9} {:>9} {:>9} {:>8} {:>6} {:>7} {:>7}".format(*HEADER), f"{'MB':>6}")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "certificate.json"
        for file in options.graphs:
            graph = load(file)
            peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
            for fraction in map(float, options.budgets.split(",")):
                budget_bytes = int(fraction * peak_bytes)
                solution = SnapshotRefinement(time_limit_seconds=options.solver_time_limit).solve(graph, budget_bytes)
                try:
                    result = measured(graph, budget_bytes, solution, path, options.time_limit, options.leaves)
                    print(row(graph, fraction, *result, path), flush=True)
                except CertificateError as error:
                    failures += 1
                    print(f"{graph.name[:24]:24} {len(graph):5} {fraction:6.2f} {error}", flush=True)
    print(f"# {failures} certificates were not made, or refused")
    return min(failures, 99)


if __name__ == "__main__":
    sys.exit(main())
