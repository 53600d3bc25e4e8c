"""The staged mixed-integer program: Checkmate's idea with stages of many operators, for hundreds of them.

After Jain et al., *Checkmate*, MLSys 2020 (every operator a stage); that stages may be coarser where the order inside
of them is fixed just in time is this project's own. :mod:`solvers.staged_model` has the formulation.

*Search class*: staged, and repetitions only right before their first possible use in a stage. *Bound*: none of its
own where stages hold several operators: the program is then a restriction, whose dual bound says nothing about other
schedules (the trace has it, as what this program could still gain). Where every operator is a stage, nothing is tiny
and nothing is reused in place, the program is Checkmate's and its dual bound is published, for the staged class.

*Limits*: about (stages · operators) columns. Measured with 13 stages and 60 s of one thread of HiGHS, machine busy:
a ResNet-50 of 408 operators (4,846 columns) within 0.1 % of a step of the best known at 0.8, 0.6 and 0.5 of the peak; a
12-layer GPT-2 of 679 operators (7,298 columns) within 0.13 % at 0.8, 1.4 % at 0.6, and nothing found at 0.5.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from graph_capture.graph import Graph
from solvers.hints import NO_HINTS, Hints, Progress
from solvers.schedule import Schedule
from solvers.snapshot.engine import Answer, EnginePool, Limits, Outcome
from solvers.solution import SearchClass, Solution, Solver
from solvers.staged_memory import StageMemory
from solvers.staged_model import StageColumns
from solvers.verdict import EVERY_SCHEDULE, Candidate, Verdict, cheapest, judge

_EXACT_SCOPE = "staged schedules: ordered, and each operator at most once between two first executions, in order"
# Engines keep rows to 1e-6 of a thousandth of the budget; this much less budget makes up for it.
_MARGIN = 1e-8


@dataclass(frozen=True)
class Staged(Solver):
    """The cheapest schedule with repetitions once per stage, at fixed places in it.

    **Fields:**

    - `stages`: how many; the forward phase is one, and the backward phase is split evenly. Without a backward phase
      everything is split evenly.
    - `boundaries`: the first operator of each stage instead, ascending, 0 first.
    - `tiny_fraction`: values below this fraction of the store-all peak are kept as long as anything can want them.
    - `time_limit_seconds`, `node_limit`: for the engine; the second is deterministic.
    - `gap`: stop when the engine's overhead and bound are this close, as a fraction of the store-all step.
    - `max_columns`: larger programs are refused before they are built whole.
    """

    stages: int = 13
    boundaries: tuple[int, ...] | None = None
    tiny_fraction: float = 1e-4
    time_limit_seconds: float = 60.0
    gap: float = 1e-4
    engine: Literal["HIGHS", "GSCIP", "CP_SAT", "GUROBI"] = "HIGHS"
    node_limit: int | None = None
    max_columns: int = 200_000
    seed: int = 0
    name: ClassVar[str] = "staged"

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise ValueError(f"stages is {self.stages}; at least one is needed")
        bounds = self.boundaries
        if bounds is not None and (bounds[:1] != (0,) or list(bounds) != sorted(set(bounds))):
            raise ValueError(f"boundaries {bounds} are not ascending from 0")

    def applies_to(self, graph: Graph) -> str | None:
        """The reason why the graph is refused: the program's size, or boundaries that it does not have."""
        starts = self.starts(graph)
        if starts and len(graph) and starts[-1] >= len(graph):
            return f"boundaries name operator {starts[-1]}; the graph has {len(graph)} operators"
        columns = sum(2 * start + (end - start) for start, end in zip(starts, [*starts[1:], len(graph)], strict=True))
        if columns <= self.max_columns:
            return None
        return (
            f"{len(graph)} operators in {len(starts)} stages make about {columns:,} columns (max_columns is "
            f"{self.max_columns:,}): ask for fewer stages or use the solver 'snapshot'"
        )

    def starts(self, graph: Graph) -> list[int]:
        """The first operator of each stage."""
        if self.boundaries is not None:
            return list(self.boundaries)
        n = len(graph)
        backward = next((i for i, o in enumerate(graph.operators) if o.phase == "backward"), n)
        split_from = backward if 0 < backward < n and self.stages > 1 else 0
        parts = self.stages - (1 if split_from else 0)
        even = (split_from + (n - split_from) * part // parts for part in range(parts))
        return sorted({0, *even})

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """The cheapest schedule of the program within the budget, as far as the limits allow."""
        exact = self._is_checkmate(graph)
        scope = _EXACT_SCOPE if exact else EVERY_SCHEDULE
        verdict = Verdict.start(self, graph, budget_bytes, SearchClass.STAGED, scope)
        candidates = [judge(graph, s) for s in (Schedule.store_all(graph), *hints.schedules)]
        if candidates[0].peak_bytes <= budget_bytes or verdict.below_floor:
            return verdict.conclude(candidates)
        reason = self.applies_to(graph)
        if reason is not None:
            return verdict.not_applicable(reason)
        return self._search(verdict, candidates, exact, hints)

    def _is_checkmate(self, graph: Graph) -> bool:
        """Whether the program is Checkmate's, so that its dual bound speaks of the whole staged class."""
        every = self.starts(graph) == list(range(len(graph)))
        return every and self.tiny_fraction == 0.0 and not any(o.in_place for o in graph.operators)

    def _search(self, verdict: Verdict, candidates: list[Candidate], exact: bool, hints: Hints) -> Solution:
        budget_bytes, until = verdict.budget_bytes, time.monotonic() + self.time_limit_seconds
        tiny_bytes = math.ceil(self.tiny_fraction * candidates[0].peak_bytes)
        nothing = f"no schedule with repetitions once per stage, at their fixed places, fits {budget_bytes:,} bytes"
        with EnginePool((self.engine,)) as pool:
            model, answer = self._ask(pool, verdict, tiny_bytes, budget_bytes, until)
            if answer is None or answer.outcome is Outcome.INFEASIBLE:
                return verdict.conclude(candidates, infeasible=exact, message=nothing)
            candidates += self._schedules(verdict.graph, model, answer)
            self._report(hints, verdict, candidates)
            if answer.has_point and candidates[-1].peak_bytes > budget_bytes:
                model, tighter = self._ask(pool, verdict, tiny_bytes, budget_bytes * (1 - _MARGIN), until)
                candidates += self._schedules(verdict.graph, model, tighter) if tighter is not None else []
        size = (
            f"{len(model.starts)} stages, {len(model.program.costs):,} columns, {len(model.program.row_lower):,} rows"
        )
        bound = max(0.0, answer.dual_bound) if math.isfinite(answer.dual_bound) else 0.0
        return verdict.conclude(
            candidates,
            lower_bound=bound if exact else 0.0,
            hit_limit=answer.outcome is Outcome.LIMIT,
            trace=(f"{size}; {self.engine}: {answer.outcome.value}; dual bound of this program alone {bound:.4%}",),
        )

    def _ask(
        self, pool: EnginePool, verdict: Verdict, tiny_bytes: int, budget_bytes: float, until: float
    ) -> tuple[StageColumns, Answer | None]:
        """The program and the engine's answer; no answer if some operator alone needs more than the budget."""
        model = StageColumns(verdict.graph, self.starts(verdict.graph), tiny_bytes)
        if StageMemory(model, budget_bytes).hopeless is not None:
            return model, None
        limits = Limits(
            time_limit_seconds=max(0.1, until - time.monotonic()),
            relative_gap=0.0,
            absolute_gap=max(self.gap, 1e-7),
            node_limit=self.node_limit,
            seed=self.seed,
        )
        return model, pool.solve(model.program.serialized(), limits)

    def _schedules(self, graph: Graph, model: StageColumns, answer: Answer) -> Sequence[Candidate]:
        if not answer.has_point:
            return []
        return [judge(graph, Schedule.from_order(graph, model.order(answer.columns)))]

    def _report(self, hints: Hints, verdict: Verdict, candidates: Sequence[Candidate]) -> None:
        best = cheapest(candidates, verdict.budget_bytes)
        seconds = time.perf_counter() - verdict.started
        overhead = best.overhead if best is not None else math.inf
        hints.report(Progress(self.name, "program solved", seconds, self.time_limit_seconds, overhead, 0.0))
