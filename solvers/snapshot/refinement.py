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
makes one of them never repeats). Limits: memory inside of a burst of recomputation is not in the relaxation, so the
gap need not close even when every instant is asked; on graphs whose backward pass may be recomputed as well there are
more columns, and bounds are looser.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from importlib.util import find_spec

from graph_capture.graph import Graph
from solvers.schedule import Schedule
from solvers.simulator import Simulation, simulate
from solvers.snapshot.anneal import Annealer, Cooling
from solvers.snapshot.engine import Answer, EnginePool, Limits, Outcome
from solvers.snapshot.lift import lift
from solvers.snapshot.reduction import Reduction, reduce
from solvers.snapshot.relaxation import PERCENT, Relaxation, build
from solvers.solution import SearchClass, Solution, Solver, Status

BOUND_SCOPE = (
    "every schedule that first runs the operators in captured order and runs any repeatable operator again, "
    "any number of times, anywhere outside of the loss"
)

BOUND_MARGIN_PERCENT = 1e-4
"""Subtracted from every dual bound: the engines' dual feasibility tolerance (1e-7 per column), with room to spare."""

OPTIMALITY_TOLERANCE = 2e-6
"""A gap below this fraction of the step counts as closed: the margin above, and the engines' own absolute gap."""

ALL_ROWS_LIMIT = 500
"""Up to so many operators every position has a memory row from the start; above, rows come where they are violated."""

INSTANTS_PER_ROUND, INSTANTS_APART = 4, 8
MENDABLE = 1.6
"""A lifted sequence whose peak is below this multiple of the budget is worth annealing."""

REPAIRABLE, REPAIRS_PER_ROUND = 1.1, 3
"""A lifted sequence below this multiple of the budget is first repaired by charging its excess to the MILP."""

NODES_PER_ROUND, MOVES_PER_ROUND = 500, 20_000
"""Deterministic work of one round under a `work_limit`."""

MENDING = Cooling()
POLISHING = Cooling(first_temperature=0.1, first_price=100.0, last_price=1000.0)
SQUEEZING = Cooling(first_temperature=0.5, first_price=200.0, last_price=3000.0)


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

    name = "snapshot refinement"

    def solve(self, graph: Graph, budget_bytes: int) -> Solution:
        """See :meth:`solvers.solution.Solver.solve`."""
        began = time.monotonic()
        store_all = Schedule.store_all(graph)
        baseline = simulate(graph, store_all)
        if baseline.peak_bytes <= budget_bytes:
            return _solution(self, began, Status.OPTIMAL, store_all, 0.0, 0.0, baseline.peak_bytes)
        reduction = reduce(graph, baseline.peak_bytes)
        floors = [reduction.floor_bytes(j) for j in range(len(graph))]
        floor = max(range(len(graph)), key=floors.__getitem__)
        engines = self.engines if self.work_limit is None else self.engines[:1]
        with EnginePool(engines) as pool:
            search = _Search(self, reduction, budget_bytes, baseline, pool, began)
            if floors[floor] > budget_bytes:
                search.forbidden_at = floor
            else:
                search.run()
            return search.conclude(floor, floors[floor])


@dataclass
class _Search:
    """One solve under way; percent means percent of the store-all step."""

    options: SnapshotRefinement
    reduction: Reduction
    budget_bytes: int
    baseline: Simulation
    pool: EnginePool
    began: float
    lower_bound: float = 0.0
    best_percent: float = math.inf
    best: list[int] | None = None
    best_peak_bytes: int = 0
    forbidden_at: int | None = None
    smallest_peak_bytes: int = 0
    relative_gap: float = 1e-2
    rounds: int = 0
    hit_limit: bool = False
    surcharge_bytes: dict[int, int] = field(default_factory=dict[int, int])
    trace: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.graph = self.reduction.graph
        self.smallest_peak_bytes = self.baseline.peak_bytes
        start = max(0, self.graph.last_forward)
        profile = self.baseline.timeline_bytes
        self.instants = {0, max(range(start, len(profile)), key=profile.__getitem__)}
        self.rows: set[int] | None = set() if len(self.graph) > ALL_ROWS_LIMIT else None
        self.annealer = Annealer(self.graph) if find_spec("numba") else None

    # ---------------------------------------------------------------- limits

    def remaining_seconds(self) -> float:
        return self.options.time_limit_seconds - (time.monotonic() - self.began)

    def closed(self) -> bool:
        return self.best_percent - self.lower_bound <= PERCENT * self.options.gap

    def exhausted(self) -> bool:
        limit = self.options.work_limit
        self.hit_limit = self.remaining_seconds() <= 0.0 or (limit is not None and self.rounds >= limit)
        return self.hit_limit

    def log(self, text: str) -> None:
        seconds = time.monotonic() - self.began
        gap = f"{self.lower_bound:.3f} .. {self.best_percent:.3f}"
        self.trace.append(f"{seconds:7.2f} s  round {self.rounds}  [{gap}]  {text}")

    # ---------------------------------------------------------------- the loop

    def run(self) -> None:
        while not self.exhausted() and not self.closed():
            self.rounds += 1
            relaxation = build(self.reduction, self.budget_bytes, self.instants, self.rows)
            answer = self.ask(relaxation)
            if answer.outcome is Outcome.INFEASIBLE:
                self.forbidden_at = self.tightest_position()
                return
            if math.isfinite(answer.dual_bound):
                self.lower_bound = max(self.lower_bound, answer.dual_bound - BOUND_MARGIN_PERCENT)
            over = self.learn(lift(self.reduction, relaxation, answer.columns)) if answer.has_point else {}
            if not self.closed() and not self.refine(over, answer):
                self.polish_further()

    def ask(self, relaxation: Relaxation) -> Answer:
        """Solve one relaxation, loosely: its bound and its point both only have to be good enough to go on."""
        limits = Limits(
            time_limit_seconds=max(0.1, min(max(3.0, 0.3 * self.options.time_limit_seconds), self.remaining_seconds())),
            relative_gap=self.relative_gap,
            absolute_gap=max(1e-6, 0.1 * PERCENT * self.options.gap),
            seed=self.options.seed,
        )
        if self.options.work_limit is not None:
            limits = dataclasses.replace(limits, node_limit=NODES_PER_ROUND)
        answer = self.pool.solve(relaxation.program.serialized(), limits)
        self.log(
            f"MILP {len(relaxation.program.costs)} columns, {len(relaxation.program.row_lower)} rows, "
            f"{len(relaxation.instants)} instants: {answer.outcome.name} {answer.objective:.3f} "
            f"(bound {answer.dual_bound:.3f}) by {answer.engine} in {answer.seconds:.2f} s"
        )
        return answer

    def learn(self, order: list[int]) -> dict[int, int]:
        """Judge a lifted sequence and mend it; returns where it went over the budget, with the bytes there."""
        simulation = self.consider(order)
        ratio = simulation.peak_bytes / self.budget_bytes
        over = positions_over(self.graph, order, simulation, self.budget_bytes)
        self.log(f"lifted: {percent_of(self.graph, simulation):.3f} % at {ratio:.5f} of the budget")
        if 1.0 < ratio < REPAIRABLE:
            self.repair(over)
        if ratio > 1.0 and not self.closed() and (ratio < MENDABLE or self.rounds > 4):
            self.anneal(order, MENDING, 0.12)
        return over

    def repair(self, over: dict[int, int]) -> None:
        """Charge what a lifted sequence had too much to the positions where it had it, and solve and lift again.

        The excess comes from what the relaxation does not count: tiny values, and bursts of recomputation.
        """
        for _ in range(REPAIRS_PER_ROUND):
            if not over or self.remaining_seconds() <= 0.0:
                return
            for j, live in over.items():
                charged = self.surcharge_bytes.get(j, 0)  # where charging the excess did not help, charge twice as much
                self.surcharge_bytes[j] = max(2 * charged, charged + live - self.budget_bytes)
            rows = None if self.rows is None else self.rows | set(self.surcharge_bytes)
            relaxation = build(self.reduction, self.budget_bytes, self.instants, rows, self.surcharge_bytes)
            answer = self.ask(relaxation)
            if not answer.has_point:
                self.surcharge_bytes.clear()
                return
            order = lift(self.reduction, relaxation, answer.columns)
            simulation = self.consider(order)
            self.log(f"repaired: {percent_of(self.graph, simulation):.3f} %, {simulation.peak_bytes} bytes")
            over = positions_over(self.graph, order, simulation, self.budget_bytes)

    def consider(self, order: list[int]) -> Simulation:
        """Simulate a sequence, and take it if it is the best that fits."""
        simulation = simulate(self.graph, Schedule.from_order(self.graph, order))
        self.smallest_peak_bytes = min(self.smallest_peak_bytes, simulation.peak_bytes)
        percent = percent_of(self.graph, simulation)
        if simulation.peak_bytes <= self.budget_bytes and percent < self.best_percent:
            self.best, self.best_percent, self.best_peak_bytes = list(order), percent, simulation.peak_bytes
        return simulation

    def anneal(self, order: list[int], cooling: Cooling, share: float) -> None:
        """Anneal for a share of the time limit, or until the gap is closed."""
        seconds = min(max(1.0, share * self.options.time_limit_seconds), self.remaining_seconds())
        if self.annealer is None or seconds <= 0.0:
            return
        result = self.annealer.anneal(
            order,
            self.budget_bytes,
            seed=self.options.seed + self.rounds,
            cooling=cooling,
            seconds=seconds,
            moves=MOVES_PER_ROUND if self.options.work_limit is not None else None,
            stop=lambda percent: (
                percent - self.lower_bound <= PERCENT * self.options.gap or self.remaining_seconds() <= 0.0
            ),
        )
        if result.best is None:
            self.consider(result.last)
        else:
            self.consider(self.annealer.polish(result.best, self.budget_bytes))
        self.log(f"annealed: {result.percent:.3f} % after {result.moves} moves")

    def refine(self, over: dict[int, int], answer: Answer) -> bool:
        """Add the worst positions, apart from each other, as instants, and rows at local maxima."""
        if answer.has_point and answer.objective - answer.dual_bound > 0.5 * (self.best_percent - self.lower_bound):
            self.relative_gap = max(self.relative_gap / 2, 1e-5)
        fresh: list[int] = []
        for j in sorted(over, key=lambda j: -over[j]):
            if j not in self.instants and all(abs(j - other) > INSTANTS_APART for other in fresh):
                fresh.append(j)
            if len(fresh) == INSTANTS_PER_ROUND:
                break
        self.instants.update(fresh)
        if self.rows is not None:
            near = (-3, -2, -1, 1, 2, 3)
            self.rows |= {j for j in over if all(over[j] >= over.get(j + d, 0) for d in near)}
        return bool(fresh)

    def polish_further(self) -> None:
        """Nothing new to ask: a tighter MILP next time, and the schedule at hand is annealed once more."""
        self.relative_gap = max(self.relative_gap / 2, 1e-5)
        if self.best is not None and not self.exhausted():
            self.anneal(self.best, POLISHING, 0.2)

    # ---------------------------------------------------------------- infeasible budgets

    def tightest_position(self) -> int:
        """The operator with the least room for anything but itself; a proof of infeasibility needs no more than one."""
        return max(range(len(self.graph)), key=self.reduction.floor_bytes)

    def conclude(self, floor: int, floor_bytes: int) -> Solution:
        if self.forbidden_at is not None:
            return self._infeasible(floor_bytes)
        if self.best is None:
            message = f"no schedule found; the smallest peak met is {self.smallest_peak_bytes} bytes"
            bound = self.lower_bound / PERCENT
            solution = _solution(self.options, self.began, Status.UNKNOWN, None, math.inf, bound, 0)
        else:
            schedule = Schedule.from_order(self.graph, self.best)
            overhead, bound = self.best_percent / PERCENT, min(self.best_percent, self.lower_bound) / PERCENT
            status = Status.OPTIMAL if overhead - bound <= OPTIMALITY_TOLERANCE else Status.FEASIBLE
            message = ""
            solution = _solution(self.options, self.began, status, schedule, overhead, bound, self.best_peak_bytes)
        return dataclasses.replace(
            solution,
            message=message,
            hit_limit=self.hit_limit and not self.closed(),
            smallest_known_budget_bytes=self.smallest_peak_bytes,
            floor_operator=floor,
            trace=tuple(self.trace),
        )

    def _infeasible(self, floor_bytes: int) -> Solution:
        assert self.forbidden_at is not None
        if self.best is not None:
            raise AssertionError("a schedule fits a budget that was proven infeasible; please report this graph")
        name = self.graph.operators[self.forbidden_at].name
        message = (
            f"no schedule of this order fits: operator {self.forbidden_at} ({name}) is where memory is tightest; "
            f"by itself it needs {floor_bytes} bytes; a schedule with {self.smallest_peak_bytes} bytes is known"
        )
        solution = _solution(self.options, self.began, Status.INFEASIBLE, None, math.inf, math.inf, 0)
        return dataclasses.replace(
            solution,
            message=message,
            smallest_known_budget_bytes=self.smallest_peak_bytes,
            floor_operator=self.forbidden_at,
            trace=tuple(self.trace),
        )


def percent_of(graph: Graph, simulation: Simulation) -> float:
    """Recomputed seconds in percent of the store-all step."""
    return PERCENT * simulation.recomputed_seconds / graph.step_seconds if graph.step_seconds else 0.0


def positions_over(graph: Graph, order: list[int], simulation: Simulation, budget_bytes: int) -> dict[int, int]:
    """Captured position -> bytes where a sequence exceeds the budget; a burst counts for the operator behind it."""
    schedule_order = Schedule.from_order(graph, order).order
    seen: set[int] = set()
    is_first = [not (o in seen or seen.add(o)) for o in schedule_order]
    over: dict[int, int] = {}
    current = len(graph) - 1
    for position in range(len(schedule_order) - 1, -1, -1):
        if is_first[position]:
            current = schedule_order[position]
        if (live := simulation.timeline_bytes[position]) > budget_bytes:
            over[current] = max(over.get(current, 0), live)
    return over


def _solution(
    options: SnapshotRefinement,
    began: float,
    status: Status,
    schedule: Schedule | None,
    overhead: float,
    lower_bound: float,
    peak_bytes: int,
) -> Solution:
    return Solution(
        solver=options.name,
        status=status,
        schedule=schedule,
        overhead=overhead,
        lower_bound=lower_bound,
        predicted_peak_bytes=peak_bytes,
        search_class=SearchClass.ORDERED,
        bound_scope=BOUND_SCOPE,
        seconds=time.monotonic() - began,
    )
