"""Compare all solvers on one model: overhead, bound, peak and seconds for each, and an HTML page of the curve.

    python examples/compare_solvers.py [--blocks 6] [--budget 75%] [--time-limit 10] [--html curve.html]

The graph is captured once; every solver gets the same graph and the same budget, and the simulator judges what each
returns. A gap is printed only where the solver has a bound of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from graph_capture.capture import capture
from planner import parse_budget
from planner.page import curve_page
from planner.pictures.points import Point, reference_points
from solvers.registry import SOLVERS
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.solution import with_time_limit


class UNet(nn.Module):
    """Convolutions with skips between the way down and the way up."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(8 if i else 3, 8, 3, padding=1) for i in range(blocks))
        self.up = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mean square of the result."""
        skips: list[torch.Tensor] = []
        for layer in self.down:
            x = torch.nn.functional.silu(layer(x))
            skips.append(x)
        for layer in self.up:
            x = torch.nn.functional.silu(layer(x)) + skips.pop()
        return x.square().mean()


def main() -> None:
    """Capture once, solve with everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--budget", default="75%")
    parser.add_argument("--time-limit", type=float, default=10.0)
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS))
    parser.add_argument("--html", help="also write a page with the points of all solvers")
    options = parser.parse_args()
    graph = capture(UNet(options.blocks), (torch.zeros(4, 3, 64, 64),), {}, gradient_accumulation=False).graph
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    budget_bytes = parse_budget(options.budget).resolve(peak_bytes)
    print(f"{len(graph)} operators, store-all peak {peak_bytes:,} bytes, budget {budget_bytes:,} bytes")
    points: list[Point] = []
    for name in options.solvers:
        solver = with_time_limit(SOLVERS[name].load()(), options.time_limit)
        solution = solver.solve(graph, budget_bytes)
        if solution.schedule is None:
            print(f"{name:<20}  {solution.status.name.lower()}: {solution.message}")
            continue
        print(
            f"{name:<20}  overhead {100 * solution.overhead:6.3f} %, lower bound {100 * solution.lower_bound:6.3f} %, "
            f"peak {solution.predicted_peak_bytes:,}, {solution.seconds:.2f} s, {solution.status.name.lower()}"
        )
        bound = solution.lower_bound or None
        points.append(Point(name, "other", budget_bytes, solution.predicted_peak_bytes, solution.overhead, bound))
    if options.html:
        page = curve_page("U-Net, every solver", peak_bytes, (), [*points, *reference_points(graph, [budget_bytes])])
        Path(options.html).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
