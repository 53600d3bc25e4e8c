"""Moccasin: rematerialization by constraint programming with retention intervals.

Bartan, Li, Teague, Lott, Dilkina: *Moccasin: Efficient Tensor Rematerialization for Neural Networks*, ICML 2023, arXiv
2304.14463. Every value is in memory over at most C intervals; that takes O(n) integers where Checkmate takes O(n²)
binaries. :mod:`solvers.interval_model` has the formulation, and what it counts on the safe side. One phase here: the
paper first looks for any solution within the memory, for the start of the second.

*Search class*: C intervals: staged schedules in which no operator runs more than C times. *Bound*: the engine's, for
that class with its bytes rounded up and nothing reused in place; no bound for any other class. *Limits*: with one
worker and C = 2 the optimum in under a second up to 75 operators, in 9 s on a MobileNet of 185, and nothing within 25 s
on a ResNet-50 of 353; `max_operators` refuses what is larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from graph_capture.graph import Graph
from solvers.backends import backend
from solvers.hints import NO_HINTS, Hints
from solvers.interval_model import COST_SCALE, IntervalModel
from solvers.schedule import Schedule
from solvers.solution import SearchClass, Solution, Solver
from solvers.verdict import Candidate, Verdict, judge


@dataclass(frozen=True)
class Moccasin(Solver):
    """The optimum of the class of C intervals, on small graphs.

    **Fields:**

    - `intervals`: C, the most times that an operator runs.
    - `time_limit_seconds`: for the engine. `work_limit`: a limit in CP-SAT's deterministic time, which is the same on
      every machine (with one worker), unlike seconds.
    - `workers`: threads; with more than one the schedule may differ from run to run.
    - `max_operators`: larger graphs are refused.
    """

    intervals: int = 2
    time_limit_seconds: float = 60.0
    work_limit: float | None = None
    workers: int = 1
    seed: int = 0
    max_operators: int = 250
    name: ClassVar[str] = "moccasin"

    def __post_init__(self) -> None:
        for field in ("intervals", "workers"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1")

    def applies_to(self, graph: Graph) -> str | None:
        """The reason why the graph is refused: its size."""
        if len(graph) <= self.max_operators:
            return None
        return (
            f"{len(graph)} operators are too many for Moccasin's constraint program "
            f"(max_operators is {self.max_operators}): use the solver 'snapshot'"
        )

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """The cheapest schedule of the class within the budget, as far as the limits allow."""
        scope = (
            f"schedules with at most {self.intervals} intervals per value on the staged timeline, bytes rounded up, "
            "nothing reused in place"
        )
        verdict = Verdict.start(self, graph, budget_bytes, SearchClass.INTERVALS, scope)
        reason = self.applies_to(graph)
        if reason is not None:
            return verdict.not_applicable(reason)
        store_all = judge(graph, Schedule.store_all(graph))
        if store_all.peak_bytes <= budget_bytes or verdict.below_floor:
            return verdict.conclude([store_all])
        return self._search(verdict, store_all)

    def _search(self, verdict: Verdict, store_all: Candidate) -> Solution:
        with backend("ortools"):
            from ortools.sat.python import cp_model

        graph, budget_bytes = verdict.graph, verdict.budget_bytes
        model = IntervalModel(graph, budget_bytes, self.intervals)
        engine: Any = cp_model.CpSolver()
        engine.parameters.max_time_in_seconds = max(0.0, self.time_limit_seconds)
        if self.work_limit is not None:
            engine.parameters.max_deterministic_time = self.work_limit
        engine.parameters.num_workers = self.workers
        engine.parameters.random_seed = self.seed
        status = engine.solve(model.model)
        trace = (f"CP-SAT: {engine.status_name(status)} after {engine.num_branches:,} branches",)
        if status == cp_model.INFEASIBLE:
            message = f"no schedule of {self.intervals} intervals per value fits within {budget_bytes:,} bytes"
            return verdict.conclude([store_all], infeasible=True, message=message, trace=trace)
        candidates = [store_all]
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            candidates.append(judge(graph, Schedule.from_order(graph, model.order(engine))))
        elif status != cp_model.UNKNOWN:
            raise RuntimeError(f"CP-SAT refused the program: {engine.status_name(status)}")
        bound = max(0.0, engine.best_objective_bound / COST_SCALE)
        hit_limit = status != cp_model.OPTIMAL
        return verdict.conclude(candidates, lower_bound=bound, hit_limit=hit_limit, trace=trace)
