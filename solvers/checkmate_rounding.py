"""Checkmate's approximation: the linear relaxation of its program, rounded in two phases.

Jain, Jain, Nrusimha, Gholami, Abbeel, Keutzer, Stoica, Gonzalez: *Checkmate: Breaking the Memory Wall with Optimal
Tensor Rematerialization*, MLSys 2020, arXiv 1910.02653, section 5 and algorithm 2:

1. solve the program of :mod:`solvers.checkmate_model` with all columns between 0 and 1;
2. keep what the point keeps by more than the threshold: S_int = [S > 0.5];
3. recompute what S_int makes necessary and no more: what stage t + 1 keeps and stage t neither keeps nor makes, then,
   from the last operator to the first, every input that is not there. This R is minimal for S_int.

A rounded schedule may need more memory than the budget. The paper solves for (1 - ε) of it, with ε = 0.1 or found by a
search; here shares of the budget are tried from 1 downwards, and between the last one that has a point and the first
that has none by bisection, until the simulator accepts a schedule within the budget. (A repetition that the loss or an
operator forbids is never needed: the rows S[t+1,v] ≤ S[t,v] of such a value survive rounding.)

*Search class*: staged. *Bound*: the optimum of the linear relaxation with the whole budget, for that class alone, and
only where the engine proved it optimal with a basis, as simplex does. The relaxation is weak where it matters: on FCN8
at 0.7 of the peak it says 0.06 % against an optimum of 0.89 %. PDLP, a first-order engine, is not offered: within 10 s
it had no point of FCN8's program, which simplex solves in 2 s, and its values come with a tolerance, not with a proof.

*Limits*: O(n²) columns and O(n · edges) rows, as for Checkmate itself. One linear program takes one to two seconds at
70 operators and most of a minute at 185; `max_operators` refuses what is larger than Checkmate's own limit.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from graph_capture.graph import Graph
from solvers.checkmate_model import StagedModel
from solvers.hints import NO_HINTS, Hints, Progress
from solvers.schedule import Schedule
from solvers.snapshot.engine import Answer, EnginePool, Limits, Outcome
from solvers.solution import SearchClass, Solution, Solver
from solvers.verdict import Candidate, Verdict, cheapest, judge

_SCOPE = "staged schedules: ordered, and each operator at most once between two first executions, in order"
_RESTRICTED = f"{_SCOPE}; of several in-place pairs of an operator only the first is used"
_BOUND_MARGIN = 1e-6
"""Subtracted from the optimum of the linear program: what its tolerances may be worth, as a fraction of the step."""


@dataclass(frozen=True)
class CheckmateRounding(Solver):
    """Linear relaxation and two-phase rounding.

    **Fields:**

    - `time_limit_seconds`: for all linear programs together; building them comes on top.
    - `threshold`: values kept by more than this are kept.
    - `shares`: 1 - ε, the shares of the budget that the linear program may use, from 1 downwards.
    - `bisections`: how often the step to the first share without a point is halved.
    - `max_operators`: larger graphs are refused.
    - `engine`: both are simplex codes; HiGHS is the faster one here.
    """

    time_limit_seconds: float = 120.0
    threshold: float = 0.5
    shares: tuple[float, ...] = (1.0, 0.975, 0.95, 0.925, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
    bisections: int = 3
    max_operators: int = 360
    engine: Literal["GLOP", "HIGHS"] = "HIGHS"
    seed: int = 0
    name: ClassVar[str] = "checkmate rounding"

    def applies_to(self, graph: Graph) -> str | None:
        """The reason why the graph is refused: its size."""
        if len(graph) <= self.max_operators:
            return None
        return (
            f"{len(graph)} operators are too many for Checkmate's program of about {len(graph) ** 2:,} columns "
            f"(max_operators is {self.max_operators}): use the solver 'snapshot'"
        )

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """The first rounded schedule that fits, from the largest share of the budget downwards."""
        verdict = Verdict.start(self, graph, budget_bytes, SearchClass.STAGED, _SCOPE)
        reason = self.applies_to(graph)
        if reason is not None:
            return verdict.not_applicable(reason)
        candidates = [judge(graph, s) for s in (Schedule.store_all(graph), *hints.schedules)]
        if candidates[0].peak_bytes <= budget_bytes or verdict.below_floor:
            return verdict.conclude(candidates)
        return self._search(verdict, candidates, hints)

    def _search(self, verdict: Verdict, candidates: list[Candidate], hints: Hints) -> Solution:
        if any(len(operator.in_place) > 1 for operator in verdict.graph.operators):
            verdict = verdict.about(_RESTRICTED)
        impossible: float | None = None
        possible, bisections, remaining = 1.0, self.bisections, list(self.shares)
        with EnginePool((self.engine,)) as pool:
            search = _Search(self, verdict, hints, pool, time.monotonic() + self.time_limit_seconds, candidates)
            while not search.done and (bisections if impossible is not None else remaining):
                if impossible is None:
                    share = remaining.pop(0)
                else:
                    share, bisections = (possible + impossible) / 2, bisections - 1
                if search.try_share(share):
                    possible = share
                else:
                    impossible = share
        return search.conclude()


@dataclass
class _Search:
    """One solve under way; `done` once a rounded schedule fits, nothing can fit, or a limit is reached."""

    options: CheckmateRounding
    verdict: Verdict
    hints: Hints
    pool: EnginePool
    until: float
    candidates: list[Candidate]
    bound: float = 0.0
    hit_limit: bool = False
    infeasible: bool = False
    done: bool = False
    trace: list[str] = field(default_factory=list[str])

    def try_share(self, share: float) -> bool:
        """Relax, round and judge with this share of the budget; whether the relaxation has a point there."""
        graph, budget_bytes = self.verdict.graph, self.verdict.budget_bytes
        model = StagedModel(graph, budget_bytes * share)
        answer = self._relax(model)
        if answer is None:
            self.trace.append(f"share {share:g}: no point")
            self.done = self.infeasible = share >= 1.0
            return False
        if not answer.has_point:
            self.trace.append(f"share {share:g}: stopped at a limit")
            self.done = self.hit_limit = True
            return False
        if share >= 1.0 and answer.outcome is Outcome.OPTIMAL:
            self.bound = max(0.0, answer.dual_bound - _BOUND_MARGIN)
        order = rounded_order(model, answer.columns, self.options.threshold)
        rounded = judge(graph, Schedule.from_order(graph, order))
        self.candidates.append(rounded)
        self.trace.append(_line(share, answer, rounded, budget_bytes))
        self.done = rounded.peak_bytes <= budget_bytes
        self._report(share)
        return True

    def _relax(self, model: StagedModel) -> Answer | None:
        """The linear relaxation's answer; `None` if it has no point."""
        if model.hopeless is not None:
            return None
        seconds = self.until - time.monotonic()
        if seconds <= 0.0:
            return Answer(Outcome.LIMIT, -math.inf, math.inf, {}, "", 0.0)
        model.program.integer = [False] * len(model.program.integer)
        limits = Limits(time_limit_seconds=seconds, seed=self.options.seed)
        answer = self.pool.solve(model.program.serialized(), limits)
        return None if answer.outcome is Outcome.INFEASIBLE else answer

    def _report(self, share: float) -> None:
        best = cheapest(self.candidates, self.verdict.budget_bytes)
        self.hints.report(
            Progress(
                solver=self.options.name,
                stage=f"rounded at share {share:g}",
                seconds=time.perf_counter() - self.verdict.started,
                time_limit_seconds=self.options.time_limit_seconds,
                overhead=best.overhead if best is not None else math.inf,
                lower_bound=self.bound,
            )
        )

    def conclude(self) -> Solution:
        """The solution: the cheapest of all candidates that fit."""
        budget_bytes = self.verdict.budget_bytes
        message = f"not even the linear relaxation has a point within {budget_bytes:,} bytes" if self.infeasible else ""
        return self.verdict.conclude(
            self.candidates,
            lower_bound=self.bound,
            infeasible=self.infeasible,
            hit_limit=self.hit_limit,
            message=message,
            trace=tuple(self.trace),
        )


def _line(share: float, answer: Answer, rounded: Candidate, budget_bytes: int) -> str:
    return (
        f"share {share:g}: linear optimum {answer.objective:.4%} in {answer.seconds:.2f} s; rounded "
        f"{rounded.overhead:.4%} at {rounded.peak_bytes / max(1, budget_bytes):.4f} of the budget"
    )


def rounded_order(model: StagedModel, columns: dict[int, float], threshold: float) -> list[int]:
    """Phases 2 and 3: the executions that the values kept by more than `threshold` make necessary."""
    graph = model.graph
    kept: list[set[int]] = [set() for _ in range(len(graph) + 1)]
    for (stage, value), column in model.keep.items():
        if columns.get(column, 0.0) > threshold:
            kept[stage].add(value)
    order: list[int] = []
    for stage in range(len(graph)):
        runs = {stage}
        missing = kept[stage + 1] - kept[stage]
        runs.update(graph.values[v].producer for v in missing if _repeats(model, stage, graph.values[v].producer))
        for i in range(stage, -1, -1):
            if i in runs:
                inputs = (v for v in graph.operators[i].inputs if v not in kept[stage])
                runs.update(p for v in inputs if _repeats(model, stage, p := graph.values[v].producer))
        order.extend(sorted(runs))
    return order


def _repeats(model: StagedModel, stage: int, operator: int) -> bool:
    return (stage, operator) in model.recompute
