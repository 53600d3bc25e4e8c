"""The solver for those who do not want to choose one.

What it does, in this order:

1. the store-all schedule, if it fits and no value must be released: nothing is recomputed, and no schedule is better;
2. :class:`~solvers.snapshot.SnapshotRefinement` with all that the chain methods suggest (Chen's segments, the
   heterogeneous chain with options, revolve): they are tried while the first program is solved, so that there is an
   answer within seconds on thousands of operators, and the search goes on from the best of them. Where the gap stays
   open, the heterogeneous chain is asked once more, with finer units and more options;
3. where that found nothing, :class:`~solvers.chen.ChenGreedy` by itself, whatever the time limit;
4. on graphs without a backward phase (the papers' layered graphs), :class:`~solvers.reordered.Reordered`: there the
   order of first executions is free, and worth more than recomputation;
5. on small graphs whose gap stays open, :class:`~solvers.checkmate.Checkmate` with the rest of the time: exact in its
   class, where memory inside of bursts of recomputation decides, of which the relaxation sees only a part.

The cheapest schedule that the simulator accepts wins; `schedule_by` and `bound_by` say whose it is and whose the bound
is. Ask :meth:`Auto.select` what it would rely on, and why.

*Search class*: the union of these, all but the fourth inside of the ordered class. *Bound*: the one of snapshot
refinement, a relaxation of the ordered class; the bounds of the others speak of their own, narrower classes and are not
used. Where another order wins, the bound is what holds for every order, and `bound_scope` says so. A larger budget
admits every schedule of a smaller one, so overheads fall with the budget but for at most the gap; nothing is remembered
from one solve to the next (:func:`solvers.pareto.curve` does remember, and is monotone).
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from graph_capture.graph import Graph
from solvers.chain_starts import chain_suggestions, fine_chain_suggestions
from solvers.chen import ChenGreedy
from solvers.hints import NO_HINTS, Hints, Progress, Suggestion
from solvers.simulator import simulate_store_all
from solvers.solution import SearchClass, Solution, Solver, Status, memory_floor, with_time_limit
from solvers.store_all import StoreAll
from solvers.verdict import INTERRUPTED

CHECKMATE_OPERATORS, CHECKMATE_SHARE, CHECKMATE_NODES = 120, 0.3, 2_000
"""Up to so many operators Checkmate gets this share of the time, or so many branch-and-bound nodes of a work limit."""

CHECKMATE_OPERATORS_BY_WORK = 40
"""The same under a work limit: it counts nodes, and a larger program spends minutes before the first one is done."""

OTHER_ORDERS_SHARE = 0.85
"""Share of the time for other orders of first executions, on graphs without a backward phase."""


@dataclass(frozen=True)
class Auto(Solver):
    """Store-all where it fits, else snapshot refinement fed by the chain methods, then Checkmate on small graphs.

    **Fields:**

    - `time_limit_seconds`: wall-clock limit of the whole.
    - `gap`: stop when overhead and bound are this close, as a fraction of the store-all step.
    - `seed`: of everything random.
    - `work_limit`: rounds of refinement (see :class:`~solvers.snapshot.SnapshotRefinement`) instead of time; the result
      is then the same on every machine, as long as the time limit is not hit.
    """

    time_limit_seconds: float = 30.0
    gap: float = 1e-3
    seed: int = 0
    work_limit: int | None = None
    name: ClassVar[str] = "auto"

    def select(self, graph: Graph, budget_bytes: int) -> tuple[Solver, str]:
        """The solver that decides for this graph and budget, and the reason for it."""
        peak_bytes = simulate_store_all(graph).peak_bytes
        if peak_bytes <= budget_bytes and not graph.released:
            return StoreAll(), f"the store-all schedule needs {peak_bytes:,} bytes and fits: nothing to recompute"
        floor_bytes, operator = memory_floor(graph)
        if budget_bytes < floor_bytes:
            at = f"operator {graph.operators[operator].name}" if len(graph) else "what is resident"
            return StoreAll(), f"nothing can fit: {at} alone needs {floor_bytes:,} bytes"
        if peak_bytes <= budget_bytes:
            reason = f"{len(graph.released)} values must be recomputed, whatever the budget"
        else:
            reason = f"the store-all schedule needs {peak_bytes:,} bytes: something must be recomputed"
        return self._refinement(graph), reason

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """The cheapest schedule that any of the solvers finds, with the best bound."""
        started = time.monotonic()
        solver, reason = self.select(graph, budget_bytes)
        solution = solver.solve(graph, budget_bytes, self._with_suggestions(graph, budget_bytes, hints))
        if solution.schedule is None:
            solution = _better(solution, ChenGreedy().solve(graph, budget_bytes))
        try:
            if not solution.interrupted:
                solution = self._ask_other_orders(graph, budget_bytes, solution, started, hints)
                solution = self._ask_checkmate(graph, budget_bytes, solution, started, hints)
        except KeyboardInterrupt:
            if solution.schedule is None:
                raise
            solution = dataclasses.replace(solution, interrupted=True, hit_limit=True, message=INTERRUPTED)
        return self._said(solution, solver, reason, time.monotonic() - started)

    def _refinement(self, graph: Graph) -> Solver:
        from solvers.snapshot import SnapshotRefinement  # late: it brings compiled code with it

        share = 1.0 - CHECKMATE_SHARE if len(graph) <= CHECKMATE_OPERATORS else 1.0
        share *= 1.0 - OTHER_ORDERS_SHARE if _one_phase(graph) else 1.0
        return SnapshotRefinement(
            time_limit_seconds=share * self.time_limit_seconds,
            gap=self.gap,
            seed=self.seed,
            work_limit=self.work_limit,
        )

    @staticmethod
    def _with_suggestions(graph: Graph, budget_bytes: int, hints: Hints) -> Hints:
        def suggest() -> Iterator[Suggestion]:
            known = hints.suggest() if hints.suggest is not None else ()
            return itertools.chain(known, chain_suggestions(graph, budget_bytes))

        def suggest_slowly() -> Iterator[Suggestion]:
            known = hints.suggest_slowly() if hints.suggest_slowly is not None else ()
            return itertools.chain(known, fine_chain_suggestions(graph, budget_bytes))

        return dataclasses.replace(hints, suggest=suggest, suggest_slowly=suggest_slowly)

    def _report(self, hints: Hints, stage: str, found: Solution, started: float) -> None:
        seconds, limit = time.monotonic() - started, self.time_limit_seconds
        hints.report(Progress(self.name, stage, seconds, limit, found.overhead, found.lower_bound))

    def _ask_checkmate(
        self, graph: Graph, budget_bytes: int, found: Solution, started: float, hints: Hints
    ) -> Solution:
        """The better one of `found` and Checkmate's answer, if the graph is small and the gap is open."""
        proven = found.status in (Status.OPTIMAL, Status.INFEASIBLE)
        most = CHECKMATE_OPERATORS if self.work_limit is None else CHECKMATE_OPERATORS_BY_WORK
        if proven or found.interrupted or len(graph) > most or found.gap <= self.gap:
            return found
        rest = self.time_limit_seconds - (time.monotonic() - started)
        if rest <= 0.0:
            return found
        from solvers.checkmate import Checkmate

        self._report(hints, "asking Checkmate, as the graph is small", found, started)
        nodes = CHECKMATE_NODES if self.work_limit is not None else None
        other = Checkmate(time_limit_seconds=rest, node_limit=nodes, seed=self.seed).solve(graph, budget_bytes)
        return _better(found, other)

    def _ask_other_orders(
        self, graph: Graph, budget_bytes: int, found: Solution, started: float, hints: Hints
    ) -> Solution:
        """On graphs without a backward phase: `found`, or a cheaper schedule in another order of first executions.

        The bound of the captured order says nothing about that one, so what is published then is what holds for every
        order.
        """
        if not _one_phase(graph) or found.overhead == 0.0:
            return found
        rest = self.time_limit_seconds - (time.monotonic() - started)
        floor_bytes, _ = memory_floor(graph)
        if rest <= 0.0 or budget_bytes < floor_bytes:
            return found
        from solvers.reordered import Reordered

        self._report(hints, "trying other orders of first executions", found, started)
        solver = Reordered(time_limit_seconds=rest, gap=self.gap, seed=self.seed, work_limit=self.work_limit)
        known = (found.schedule,) if found.schedule is not None else ()
        other = solver.solve(graph, budget_bytes, Hints(schedules=known))
        if other.schedule is None or other.overhead >= found.overhead:
            return _better(found, dataclasses.replace(other, schedule=None))
        trace = (*found.trace, *(f"{other.solver}: {line}" for line in other.trace))
        return dataclasses.replace(other, schedule_by=other.solver, bound_by=other.solver, trace=trace)

    def _said(self, solution: Solution, solver: Solver, reason: str, seconds: float) -> Solution:
        """The solution as this solver's own, which says who gave what."""
        schedule_by = solution.schedule_by or solver.name
        own = solution.solver == solver.name  # else another solver's solution stands for itself
        bound_by = f"{solver.name} ({solution.bound_by})" if solution.bound_by and own else solution.solver
        parts = [reason, f"schedule by {schedule_by}, bound by {bound_by}"] if solution.schedule else []
        parts += [solution.message] if solution.message and solution.message not in parts else []
        return dataclasses.replace(
            solution,
            solver=self.name,
            search_class=SearchClass.MIXED,
            seconds=seconds,
            message="; ".join(parts),
            schedule_by=schedule_by,
            bound_by=bound_by,
        )


def _one_phase(graph: Graph) -> bool:
    return len(graph) > 0 and all(operator.phase == "forward" for operator in graph.operators)


def _better(found: Solution, other: Solution) -> Solution:
    """`found`, whose bound counts, with the schedule of `other` if that is cheaper."""
    known = [s.smallest_known_budget_bytes for s in (found, other) if s.smallest_known_budget_bytes is not None]
    outcome = other.status.name.lower()
    trace = (*found.trace, *(f"{other.solver}: {line}" for line in (*other.trace, f"{outcome}, {other.seconds:.2f} s")))
    smallest, interrupted = min(known, default=None), found.interrupted or other.interrupted
    found = dataclasses.replace(found, smallest_known_budget_bytes=smallest, interrupted=interrupted, trace=trace)
    if other.schedule is None or other.overhead >= found.overhead:
        return found
    return dataclasses.replace(
        found,
        status=Status.FEASIBLE,
        schedule=other.schedule,
        overhead=other.overhead,
        lower_bound=min(found.lower_bound, other.overhead),
        predicted_peak_bytes=other.predicted_peak_bytes,
        floor_operator=None,
        message="",
        schedule_by=other.solver,
    )


def chosen_solver(solver: Solver | None, time_limit_seconds: float | None) -> Solver:
    """The solver that was given, else `Auto`, with the time limit if one was given."""
    solver = solver if solver is not None else Auto()
    return solver if time_limit_seconds is None else with_time_limit(solver, time_limit_seconds)
