"""Every model × budget × solver: is the rewritten model bit-equal to the plain one, and is its peak the predicted one?

    python examples/benchmarks/correctness_grid.py [--models gpt2_eager resnet ...] [--budgets 90 70 50 40]
        [--solvers auto store-all] [--compiler inductor]

For each cell the model is planned, rewritten and stepped; loss, gradients, buffers and the final random state are
compared with the plain model's, bit for bit. A budget is a percentage of eager's peak; where it cannot be met, the
smallest budget that is known to work is used, and marked ``min``. The peak is measured for a first and for a later
micro-batch, by the allocator's events. Columns: ``equal``; bytes above what the prediction said (negative: below), as
a percentage of it, for both micro-batches; later micro-batch's measured peak against eager's; random operators
recomputed of all. A cell that cannot be filled prints its reason.

Inductor's kernels round otherwise than eager's: with ``--compiler inductor`` equal means within 1e-3 of the largest
number of a tensor, and 1e-5 of the largest of all.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from graph_capture.graph import Compiler
from planner import Plan, measure_step, plan, rewrite
from planner.errors import NoScheduleError
from planner.measure import StepMeasurement, loss_of
from solvers import Auto, Checkmate, ChenGreedy, Solver, StoreAll
from tests.models import MODELS, Case

SOLVERS: dict[str, Solver] = {
    "auto": Auto(time_limit_seconds=8.0),
    "chen": ChenGreedy(),
    "checkmate": Checkmate(time_limit_seconds=30.0, max_operators=80),
    "store-all": StoreAll(),
}


@dataclass
class Tally:
    """What the grid adds up to."""

    cells: int = 0
    unequal: list[str] = field(default_factory=list)
    other_kernels: dict[str, float] = field(default_factory=dict)
    over: list[str] = field(default_factory=list)
    off: list[str] = field(default_factory=list)
    above_eager: list[str] = field(default_factory=list)
    empty: int = 0
    random_share: dict[str, float] = field(default_factory=dict)


def step(model: torch.nn.Module, case: Case) -> dict[str, torch.Tensor]:
    """One training step; everything that must be equal afterwards, by name."""
    model.zero_grad()
    torch.manual_seed(11)
    loss = loss_of(model(*case.args, **case.kwargs), case.loss_fn)
    loss.backward()
    found = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    return found | {"loss": loss.detach(), "random state": torch.get_rng_state()}


def differences(
    plain: dict[str, torch.Tensor], planned: dict[str, torch.Tensor], compiler: Compiler = "eager"
) -> list[str]:
    """Names of what is not equal: bit for bit, or for Inductor's kernels nearly."""
    most = max(float(t.abs().max()) for t in plain.values() if t.is_floating_point() and t.numel())

    def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
        if compiler == "eager" or not a.is_floating_point() or not a.numel():
            return torch.equal(a, b)
        return float((a - b).abs().max()) <= 1e-3 * float(a.abs().max()) + 1e-5 * most

    names = plain.keys() | planned.keys()
    return [n for n in names if n not in plain or n not in planned or not equal(plain[n], planned[n])]


def largest(plain: dict[str, torch.Tensor], planned: dict[str, torch.Tensor], names: list[str]) -> float:
    """The largest difference among the named tensors."""
    return max(float((plain[n].double() - planned[n].double()).abs().max()) for n in names)


def make_plan(case: Case, model: torch.nn.Module, budget: int | str, solver: Solver, compiler: Compiler) -> Plan:
    """Plan one case."""
    return plan(model, budget, case.args, case.kwargs, loss_fn=case.loss_fn, solver=solver, compiler=compiler)


def random_recomputed(made: Plan) -> tuple[int, int]:
    """How many random operators run more than once, of how many."""
    graph, order = made.to_graph(), made.to_schedule().order
    random = {i for i, o in enumerate(graph.operators) if o.random_state_bytes}
    return sum(order.count(i) > 1 for i in random), len(random)


def measured(model: torch.nn.Module, case: Case, later: bool) -> StepMeasurement:
    """Peak of one step."""
    return measure_step(model, *case.args, loss_fn=case.loss_fn, gradient_accumulation=later, **case.kwargs)


def cell(
    name: str,
    case: Case,
    budget: str,
    solver_name: str,
    reference: Any,
    same_graph: Any,
    eager: StepMeasurement,
    tally: Tally,
    compiler: Compiler,
) -> str:
    """One row of the table."""
    solver, label = SOLVERS[solver_name], f"{name} at {budget} with {solver_name}"
    twin = copy.deepcopy(case.model)
    try:
        made = make_plan(case, twin, budget, solver, compiler)
    except NoScheduleError as error:
        if error.smallest_known_budget_bytes is None:
            tally.empty += 1
            return f"no plan: {str(error).split(';')[1].strip() if ';' in str(error) else error}"
        try:
            made = make_plan(case, twin, error.smallest_known_budget_bytes, solver, compiler)
        except NoScheduleError as second:
            tally.empty += 1
            return f"no plan: {str(second).split(';')[1].strip()}"
        budget = "min"
    rewrite(twin, made, on_change="error")
    found = step(twin, case)
    wrong, equal = differences(reference, found, compiler), "yes"
    if wrong and not differences(same_graph, found, compiler):
        # Eager runs other kernels (a fused recurrent layer): equal to the same graph without recomputation.
        tally.other_kernels[name] = max(tally.other_kernels.get(name, 0.0), largest(reference, found, wrong))
        wrong, equal = [], "graph"
    first, later = measured(twin, case, False), measured(twin, case, True)
    tally.cells += 1
    if wrong:
        tally.unequal.append(f"{label}: {', '.join(wrong[:3])}")
    if max(first.peak_bytes, later.peak_bytes) > made.budget_bytes:
        tally.over.append(label)
    off_first = 100 * (first.peak_bytes / made.first_peak_bytes - 1)
    off_later = 100 * (later.peak_bytes / made.later_peak_bytes - 1)
    if max(abs(off_first), abs(off_later)) > 1 or max(off_first, off_later) > 0:
        tally.off.append(f"{label}: {off_first:+.3f} % and {off_later:+.3f} %")
    if solver_name == "store-all" and later.peak_bytes > eager.peak_bytes:
        tally.above_eager.append(
            f"{label}: {later.peak_bytes - eager.peak_bytes:+,} bytes ({later.peak_bytes / eager.peak_bytes:.4f})"
        )
    again, of = random_recomputed(made)
    if of:
        tally.random_share[name] = max(tally.random_share.get(name, 0.0), again / of)
    return (
        f"{budget:>4} {equal if not wrong else 'NO':>5} {off_first:+9.4f} {off_later:+9.4f} "
        f"{later.peak_bytes / eager.peak_bytes:8.3f} {100 * made.overhead:8.2f} {100 * made.lower_bound:8.2f} "
        f"{again:4d}/{of:<3d}"
    )


def main() -> None:
    """Print the grid and what it adds up to; exits with 1 if a cell is not equal or over its budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[90, 70, 50, 40])
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--compiler", choices=("eager", "inductor"), default="eager")
    options = parser.parse_args()
    print(
        f"{datetime.date.today()}  torch {torch.__version__}  Python {platform.python_version()}  {platform.machine()}"
    )
    head = "budget equal  first off  later off  of eager  overhead     bound  random again"
    tally = Tally()
    for name in options.models:
        case = MODELS[name]()
        reference = step(copy.deepcopy(case.model), case)
        stored = copy.deepcopy(case.model)
        same_graph = step(rewrite(stored, make_plan(case, stored, 2**40, StoreAll(), options.compiler)), case)
        eager = measured(copy.deepcopy(case.model), case, True)
        print(f"\n{name}: eager's later micro-batch {eager.peak_bytes:,} bytes\n{'solver':<10} {head}", flush=True)
        for solver_name in options.solvers:
            budgets = [f"{b}%" for b in options.budgets] if solver_name != "store-all" else ["110%"]
            for budget in budgets:
                row = cell(name, case, budget, solver_name, reference, same_graph, eager, tally, options.compiler)
                print(f"{solver_name:<10} {row}", flush=True)
                if row.startswith(" min") or "max_operators" in row:
                    break  # smaller budgets would be the same cell
    print(f"\n{tally.cells} cells filled, {tally.empty} empty")
    lists = (
        ("not equal", tally.unequal),
        ("over their budget", tally.over),
        ("more than 1 % from the prediction, or above it", tally.off),
        ("store-all above eager", tally.above_eager),
    )
    for title, rows in lists:
        print(f"{title}: {len(rows)}" + "".join(f"\n  {row}" for row in rows))
    for name, difference in tally.other_kernels.items():
        print(f"{name}: eager runs other kernels; equal to its graph without recomputation, {difference:.1e} off eager")
    shares = ", ".join(f"{n} {100 * s:.0f} %" for n, s in tally.random_share.items())
    print(f"largest share of random operators recomputed: {shares}")
    if tally.unequal or tally.over:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
