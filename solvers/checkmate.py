"""Checkmate: optimal tensor rematerialization by mixed-integer programming.

Jain, Jain, Nrusimha, Gholami, Abbeel, Keutzer, Stoica, Gonzalez: *Checkmate: Breaking the Memory Wall with Optimal
Tensor Rematerialization*, MLSys 2020, arXiv 1910.02653: the complete program with frontier-advancing stages, every
operator a stage (not the LP approximation with rounding). :mod:`solvers.checkmate_model` has the formulation and the
one place where it is not the paper's.

*Search class*: staged. *Bound*: the engine's dual bound, for that class alone; a schedule that recomputes an operator
twice between two first executions may be cheaper, or fit where no staged one does. On a graph whose operators have
several in-place pairs the program uses the first pair only, and the scope of the bound says so.

*Limits*: O(n²) binaries and O(n · edges) rows. With one thread of HiGHS: seconds up to about 75 operators, half a
minute at 185, and on a ResNet-50 of 353 no schedule in two minutes. `max_operators` refuses what is larger before the
memory is spent.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import ClassVar, Literal

from graph_capture.graph import Graph
from solvers.checkmate_model import StagedModel
from solvers.hints import NO_HINTS, Hints, Progress
from solvers.schedule import Schedule
from solvers.snapshot.engine import Answer, EnginePool, Limits, Outcome
from solvers.solution import SearchClass, Solution, Solver
from solvers.verdict import Candidate, Verdict, judge

_SCOPE = "staged schedules: ordered, and each operator at most once between two first executions, in order"
_RESTRICTED = f"{_SCOPE}; of several in-place pairs of an operator only the first is used"
# Engines keep rows to 1e-6 of a thousandth of the budget; this much less budget makes up for it.
_MARGIN = 1e-8


@dataclass(frozen=True)
class Checkmate(Solver):
    """The optimum of the staged class, on small graphs.

    **Fields:**

    - `time_limit_seconds`: for the engine; building the model comes on top (seconds for 300 operators).
    - `gap`: stop when overhead and bound are this close, as a fraction of the store-all step.
    - `max_operators`: larger graphs are refused.
    - `engine`: a MathOpt engine for mixed-integer programs; Gurobi where a licence is.
    - `node_limit`: a limit on the branch-and-bound nodes: deterministic, unlike seconds.
    """

    time_limit_seconds: float = 60.0
    gap: float = 0.0
    max_operators: int = 360
    engine: Literal["HIGHS", "GSCIP", "CP_SAT", "GUROBI"] = "HIGHS"
    node_limit: int | None = None
    seed: int = 0
    name: ClassVar[str] = "checkmate"

    def applies_to(self, graph: Graph) -> str | None:
        """The reason why the graph is refused: its size."""
        if len(graph) <= self.max_operators:
            return None
        return (
            f"{len(graph)} operators are too many for Checkmate's program of about {len(graph) ** 2:,} binary columns "
            f"(max_operators is {self.max_operators}): use the solver 'snapshot'"
        )

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """The cheapest staged schedule within the budget, as far as the limits allow."""
        verdict = Verdict.start(self, graph, budget_bytes, SearchClass.STAGED, _SCOPE)
        reason = self.applies_to(graph)
        if reason is not None:
            return verdict.not_applicable(reason)
        store_all = judge(graph, Schedule.store_all(graph))
        if store_all.peak_bytes <= budget_bytes or verdict.below_floor:
            return verdict.conclude([store_all])
        return self._search(verdict, store_all, hints)

    def _search(self, verdict: Verdict, store_all: Candidate, hints: Hints) -> Solution:
        graph, budget_bytes = verdict.graph, verdict.budget_bytes
        model = StagedModel(graph, budget_bytes)
        if model.restricted:
            verdict = verdict.about(_RESTRICTED)
        infeasible = f"no staged schedule fits within {budget_bytes:,} bytes"
        if model.hopeless is not None:
            return verdict.conclude([store_all], infeasible=True, message=f"{infeasible}: {model.hopeless}")
        until = time.monotonic() + self.time_limit_seconds
        size = f"{len(model.program.costs):,} columns, {len(model.program.row_lower):,} rows"
        hints.report(Progress(self.name, f"solving {size}", 0.0, self.time_limit_seconds, math.inf, 0.0))
        with EnginePool((self.engine,)) as pool:
            answer = self._ask(pool, model, until)
            if answer.outcome is Outcome.INFEASIBLE:
                return verdict.conclude([store_all], infeasible=True, message=infeasible)
            candidates = [store_all, *_schedules(graph, model, answer)]
            if answer.has_point and candidates[-1].peak_bytes > budget_bytes:
                tighter = StagedModel(graph, budget_bytes * (1 - _MARGIN))
                candidates += _schedules(graph, tighter, self._ask(pool, tighter, until))
        return verdict.conclude(
            candidates,
            lower_bound=max(0.0, answer.dual_bound) if math.isfinite(answer.dual_bound) else 0.0,
            hit_limit=answer.outcome is Outcome.LIMIT,
            trace=(f"{size}; {answer.engine or self.engine}: {answer.outcome.value}",),
        )

    def _ask(self, pool: EnginePool, model: StagedModel, until: float) -> Answer:
        limits = Limits(
            time_limit_seconds=max(0.1, until - time.monotonic()),
            relative_gap=0.0,
            absolute_gap=max(self.gap, 1e-7),
            node_limit=self.node_limit,
            seed=self.seed,
        )
        return pool.solve(model.program.serialized(), limits)


def _schedules(graph: Graph, model: StagedModel, answer: Answer) -> list[Candidate]:
    """The schedule of the engine's point, if it has one."""
    if not answer.has_point:
        return []
    return [judge(graph, Schedule.from_order(graph, model.order(answer.columns)))]
