"""What must hold between solvers on any graph and budget: bounds, exhaustive search, and classes inside of classes.

:func:`examine` draws a graph from a seed, solves it with every solver for a few budgets, and asserts

* every schedule is legal, fits, and costs what the solution says;
* the lower bound of snapshot refinement, and of `Auto`, is no larger than the overhead of any schedule of the ordered
  class that any solver finds, or that exhaustive search finds where the graph is small; and infeasible only if there is
  none;
* Checkmate is equal to exhaustive search over its own class, and no better than that over the ordered class;
* Moccasin with intervals to spare is equal to Checkmate where both finish and nothing but plain operators occur;
* a schedule of proven optimum of the ordered class that happens to be staged costs what Checkmate finds.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from graph_capture.graph import Graph
from solvers import (
    Auto,
    Checkmate,
    CheckmateRounding,
    ChenGreedy,
    ChenSqrt,
    HeterogeneousChain,
    Moccasin,
    Revolve,
    Schedule,
    SnapshotRefinement,
    Solution,
    Solver,
    Status,
    StoreAll,
    memory_floor,
    simulate,
)
from solvers.snapshot.incumbent import in_captured_order
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import EVERYTHING, PLAIN, SHAPES, Features, forward_graph, joint_graph

FAMILIES = ("layered", "series_parallel", "u_shaped", "dense", "chain_with_skips", "chain")
TRAINING = Features(workspace=0.3, gradients=0.6, late_delivery=0.4, delivery_copy=0.4, in_place=0.3)
FEATURES = {"plain": PLAIN, "training": TRAINING, "everything": EVERYTHING}
TOLERANCE = 1e-6
ORDERED = (SnapshotRefinement, Auto)
"""Those whose bound speaks of the ordered class."""


@dataclass
class Ledger:
    """What has been examined; `tightest` is the least by which a schedule was above the bound."""

    counts: Counter[str] = field(default_factory=Counter[str])

    def __str__(self) -> str:
        return "\n".join(f"{number:8,} {name}" for name, number in sorted(self.counts.items()))


def draw(seed: int) -> tuple[Graph, str, str, bool]:
    """The graph of a seed, its family, its features, and whether it is small enough for exhaustive search."""
    rng = random.Random(seed)
    family, name = FAMILIES[seed % len(FAMILIES)], rng.choice(sorted(FEATURES))
    small, joint = rng.random() < 0.7, rng.random() < 0.75
    if small:
        n = rng.randint(3, 4) if joint else rng.randint(5, 8)
    else:
        n = rng.randint(6, 9) if joint else rng.randint(9, 18)
    graph = (joint_graph if joint else forward_graph)(SHAPES[family](rng, n), rng, FEATURES[name])
    return graph, family, name, small


def line_up(graph: Graph) -> list[Solver]:
    """Every solver, with limits on its work."""
    exact: list[Solver] = [Moccasin(intervals=4, work_limit=1.0), CheckmateRounding(time_limit_seconds=5.0)]
    if len(graph) <= 16:
        exact.append(Checkmate(time_limit_seconds=5.0))
    chains: list[Solver] = [ChenGreedy(), ChenSqrt(), Revolve(), HeterogeneousChain()]
    bounded: list[Solver] = [SnapshotRefinement(work_limit=3), Auto(work_limit=3)]
    return [*bounded, *exact, *(s for s in chains if s.applies_to(graph) is None), StoreAll()]


def examine(seed: int, ledger: Ledger) -> None:
    """Draw, solve, and assert."""
    graph, family, features, small = draw(seed)
    ledger.counts[f"graphs: {family}"] += 1
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    rng = random.Random(seed + 1)
    floor_bytes = memory_floor(graph)[0]
    for _ in range(2):
        budget_bytes = rng.randint(floor_bytes, max(floor_bytes, peak_bytes - 1))
        where = f"seed {seed}, budget {budget_bytes}"
        found = {solver: solver.solve(graph, budget_bytes) for solver in line_up(graph)}
        ledger.counts["budgets"] += 1
        ledger.counts["solves"] += len(found)
        for solver, solution in found.items():
            check_legal(graph, budget_bytes, solution, f"{where}, {solver.name}")
        # Auto may answer in another order where there is no backward phase; bounds of the captured one speak of others
        found = {s: f for s, f in found.items() if f.schedule is None or in_captured_order(f.schedule.order)}
        check_bounds(found, ledger, where)
        if small:
            check_against_search(graph, budget_bytes, found, ledger, where)
        check_agreement(graph, found, features == "plain", ledger, where)


def check_legal(graph: Graph, budget_bytes: int, solution: Solution, where: str) -> None:
    """The simulator agrees with what a solution says of its schedule."""
    if solution.schedule is None:
        assert math.isinf(solution.overhead), where
        return
    simulation = simulate(graph, solution.schedule)
    assert simulation.peak_bytes == solution.predicted_peak_bytes <= budget_bytes, where
    assert solution.overhead == pytest.approx(simulation.recomputed_seconds / graph.step_seconds), where


def check_bounds(found: dict[Solver, Solution], ledger: Ledger, where: str) -> None:
    """No schedule of anybody is below a bound of the ordered class, which contains all of them."""
    best = min(solution.overhead for solution in found.values())
    ledger.counts["schedules"] += sum(solution.schedule is not None for solution in found.values())
    for solver, solution in found.items():
        if isinstance(solver, ORDERED):
            assert solution.lower_bound <= best + TOLERANCE, f"{where}, {solver.name}: {solution.lower_bound} > {best}"
            ledger.counts["bounds of the ordered class"] += 1
            ledger.counts["bounds that a schedule attains"] += abs(best - solution.lower_bound) <= TOLERANCE
            ledger.counts["proofs that nothing fits"] += solution.status is Status.INFEASIBLE


def check_against_search(
    graph: Graph, budget_bytes: int, found: dict[Solver, Solution], ledger: Ledger, where: str
) -> None:
    """Exhaustive search over the ordered and over the staged class."""
    ordered = BruteForce(graph).overhead(budget_bytes)
    staged = BruteForce(graph, staged=True).overhead(budget_bytes)
    ledger.counts["budgets searched exhaustively"] += 1
    ledger.counts["of these: only an ordered schedule is optimal"] += staged > ordered + TOLERANCE
    assert staged >= ordered - TOLERANCE, where
    for solver, solution in found.items():
        assert solution.overhead >= ordered - TOLERANCE, f"{where}, {solver.name}"
        if isinstance(solver, ORDERED):
            assert solution.lower_bound <= ordered + TOLERANCE, f"{where}, {solver.name}"
            if solution.status is Status.INFEASIBLE:
                assert math.isinf(ordered), f"{where}, {solver.name}"
        if isinstance(solver, Checkmate):
            assert solution.lower_bound <= staged + TOLERANCE, where
            if not solution.hit_limit:
                assert solution.overhead == pytest.approx(staged, abs=TOLERANCE), where
                ledger.counts["Checkmate equal to search"] += 1
        if isinstance(solver, CheckmateRounding):
            assert solution.lower_bound <= staged + TOLERANCE, where


def check_agreement(graph: Graph, found: dict[Solver, Solution], plain: bool, ledger: Ledger, where: str) -> None:
    """Exact solvers agree where their classes coincide."""
    of = {type(solver): solution for solver, solution in found.items()}
    checkmate, moccasin, snapshot = of.get(Checkmate), of[Moccasin], of[SnapshotRefinement]
    ends = (Status.OPTIMAL, Status.INFEASIBLE)
    if checkmate is None or checkmate.status not in ends:
        return
    if moccasin.status in ends:
        assert moccasin.overhead >= checkmate.overhead - TOLERANCE, where
        if plain and len(graph) <= 10:  # nobody runs more than four times
            assert moccasin.overhead == pytest.approx(checkmate.overhead, abs=TOLERANCE), where
            ledger.counts["Moccasin equal to Checkmate"] += 1
    if snapshot.status is Status.OPTIMAL and snapshot.schedule is not None:
        assert snapshot.overhead <= checkmate.overhead + TOLERANCE, where
        if is_staged(snapshot.schedule):
            assert checkmate.overhead == pytest.approx(snapshot.overhead, abs=TOLERANCE), where
            ledger.counts["snapshot equal to Checkmate"] += 1


def is_staged(schedule: Schedule) -> bool:
    """Whether between two first executions operators run in captured order, each at most once."""
    seen: set[int] = set()
    stage: list[int] = []
    for operator in schedule.order:
        stage.append(operator)
        if stage != sorted(set(stage)):
            return False
        if operator not in seen:
            seen.add(operator)
            stage = []
    return True
