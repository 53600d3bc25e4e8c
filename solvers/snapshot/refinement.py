"""Snapshot refinement: recomputation schedules with a certificate, on graphs of thousands of operators.

Checkmate (Jain et al., MLSys 2020) asks at every operator what is in memory: O(n²) binaries. Memory binds at few
instants, so this solver asks only there (:mod:`~solvers.snapshot.relaxation`), lets a MILP engine close the small
program, lifts its answer to a whole sequence of executions (:mod:`~solvers.snapshot.lift`), mends what the relaxation
did not see by annealing (:mod:`~solvers.snapshot.anneal`), judges it with the simulator, and adds the instants and
memory rows at which the lifted sequence went over the budget: cutting planes for the memory, column generation for
the decisions.

Class: *ordered*: each operator first runs in captured order; repeatable operators run again any number of times,
anywhere. Bound: the dual bound of a relaxation of this class, valid at any time limit. It says nothing about other
orders of first executions, and supposes that the caller's loss, outputs and gradients are made once (an operator that
makes one of them never repeats). Limits: of the memory inside of a burst of recomputation the relaxation sees what
stays through it and what the operator at hand needs, not what is remade beside it (:mod:`~solvers.snapshot.bursts`), so
the gap need not close even when every instant is asked; on graphs whose backward pass may be recomputed as well there
are more columns, and bounds are looser.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import ClassVar

from graph_capture.graph import Graph
from solvers.hints import NO_HINTS, Hints
from solvers.schedule import Schedule
from solvers.simulator import simulate_store_all
from solvers.snapshot.engine import EnginePool
from solvers.snapshot.reduction import reduce
from solvers.snapshot.relaxation import PERCENT
from solvers.snapshot.search import OPTIMALITY_TOLERANCE, Search
from solvers.solution import SearchClass, Solution, Solver, Status
from solvers.verdict import INTERRUPTED

BOUND_SCOPE = (
    "every schedule that first runs the operators in captured order and runs any repeatable operator again, "
    "any number of times, anywhere outside of the loss"
)


RELEASED_SCOPE = f"{BOUND_SCOPE}, and holds none of the {{}} values across the turn that are to be recomputed"


@dataclass(frozen=True)
class SnapshotRefinement(Solver):
    """Near-optimal recomputation with a proven gap; the module docstring says for which class of schedules.

    **Fields:**

    - `time_limit_seconds`: wall-clock limit.
    - `gap`: stop as soon as overhead − lower bound is at most this fraction of the store-all step.
    - `seed`: of the annealer and of the engines.
    - `work_limit`: rounds of refinement, each with a fixed number of branch-and-bound nodes and annealing moves. The
      result is then the same on every machine, as long as the time limit is not hit. `None`: time alone counts.
    - `engines`: MathOpt engines that race on each MILP, each in a process of its own; with a `work_limit` the first
      one runs alone.
    """

    time_limit_seconds: float = 30.0
    gap: float = 1e-3
    seed: int = 0
    work_limit: int | None = None
    engines: tuple[str, ...] = ("HIGHS",)

    name: ClassVar[str] = "snapshot"

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """See :meth:`solvers.solution.Solver.solve`."""
        began = time.monotonic()
        store_all = Schedule.store_all(graph)
        baseline = simulate_store_all(graph)
        fits = baseline.peak_bytes <= budget_bytes and not graph.released
        if fits or not len(graph):  # without operators, what is resident decides alone
            return Solution(
                solver=self.name,
                status=Status.OPTIMAL if fits else Status.INFEASIBLE,
                schedule=store_all if fits else None,
                overhead=0.0 if fits else math.inf,
                lower_bound=0.0 if fits else math.inf,
                predicted_peak_bytes=baseline.peak_bytes if fits else 0,
                search_class=SearchClass.ORDERED,
                bound_scope=BOUND_SCOPE,
                seconds=time.monotonic() - began,
                message="" if fits else f"what is resident needs {baseline.peak_bytes:,} bytes by itself",
                smallest_known_budget_bytes=baseline.peak_bytes,
            )
        reduction = reduce(graph, baseline.peak_bytes)
        floors = [reduction.floor_bytes(j) for j in range(len(graph))]
        floor = max(range(len(graph)), key=floors.__getitem__)
        engines = self.engines if self.work_limit is None else self.engines[:1]
        with EnginePool(engines) as pool:
            search = Search(self, reduction, budget_bytes, baseline, pool, began, hints)
            search.infeasible = floors[floor] > budget_bytes
            if not search.infeasible:
                search.run()
            if search.incumbent.order is None:
                search.look_for_a_larger_budget(floors[floor])
        return _conclude(search, floor, floors[floor])


def _conclude(search: Search, floor: int, floor_bytes: int) -> Solution:
    graph, best = search.graph, search.incumbent.order
    if search.infeasible and best is not None:
        raise AssertionError("a schedule fits a budget that was proven infeasible; please report this graph")
    overhead = search.incumbent.percent / PERCENT
    bound = math.inf if search.infeasible else min(overhead, search.lower_bound / PERCENT)
    known = f"the smallest peak of any schedule met is {search.incumbent.smallest_peak_bytes} bytes"
    need = f"operator {floor} ({graph.operators[floor].name}) needs {floor_bytes} bytes by itself"
    if search.infeasible:
        status, message = Status.INFEASIBLE, f"no schedule that keeps this order fits; {need}; {known}"
    elif best is None:
        status, message = Status.UNKNOWN, f"nothing found, and no proof that nothing fits; {need}; {known}"
    else:
        status = Status.OPTIMAL if overhead - bound <= OPTIMALITY_TOLERANCE else Status.FEASIBLE
        message = INTERRUPTED if search.interrupted else ""
    return Solution(
        solver=search.options.name,
        status=status,
        schedule=None if best is None else Schedule.from_order(graph, best),
        overhead=overhead,
        lower_bound=bound,
        predicted_peak_bytes=search.incumbent.peak_bytes,
        search_class=SearchClass.ORDERED,
        bound_scope=RELEASED_SCOPE.format(len(graph.released)) if graph.released else BOUND_SCOPE,
        seconds=time.monotonic() - search.began,
        hit_limit=search.hit_limit and not search.closed(),
        message=message,
        smallest_known_budget_bytes=search.incumbent.smallest_peak_bytes,
        floor_operator=floor,
        interrupted=search.interrupted,
        schedule_by=search.incumbent.by,
        bound_by="relaxation" if search.lower_bound > PERCENT * search.hints.lower_bound else "what was known",
        trace=tuple(search.trace),
    )
