"""Local search in free order: FastSA, simulated annealing on whole sequences of executions.

Imanishi, Xu, Takagi, Wang, Castillo, "A fast heuristic to optimize time-space tradeoff for large models", NeurIPS 2023:
operators run in any legal order, any of them any number of times; moves add, remove and rotate executions; a segment
tree with range addition and range maximum gives the peak after each move in O(log n). The budget enters as a penalty
whose price grows while the temperature falls. Here the memory that is counted is that of a training step (values of
operators with several outputs, in-place reuse, workspace, generator states, deliveries in both regimes), and the search
starts from a better order of first executions (:mod:`solvers.ordering`), or from schedules that are known already.

*Search class*: free. *Bound*: only what holds for every schedule: 0, or infeasible below the memory floor. It is a
polisher for what the exact methods leave, and a solver of its own for graphs without a backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from graph_capture.graph import Graph
from solvers.hints import NO_HINTS, Hints, Progress
from solvers.ordering import OrderSearch
from solvers.precedence import violation
from solvers.schedule import Schedule
from solvers.solution import SearchClass, Solution, Solver
from solvers.verdict import Candidate, Verdict, cheapest, judge

if TYPE_CHECKING:
    from solvers.free_order.annealer import Cooling, FreeOrderAnnealer

MIN_WALKS, MAX_WALKS, OPERATORS_OF_ALL_WALKS = 3, 12, 1200
"""Small graphs get many short walks, large ones three long ones; the last one is cool, from the best schedule met."""


@dataclass(frozen=True)
class LocalSearch(Solver):
    """Any order, any recomputation; good schedules in seconds for thousands of operators, no bound.

    **Fields:**

    - `time_limit_seconds`: wall-clock limit, without the seconds that compiling takes when it is first used.
    - `move_limit`: moves of all walks together; the result is then the same on every machine, as long as the time
      limit is not hit. `None`: time alone counts.
    - `seed`: of everything random.
    """

    time_limit_seconds: float = 30.0
    move_limit: int | None = None
    seed: int = 0
    name: ClassVar[str] = "local-search"

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """The cheapest sequence that the walks meet; `hints.schedules` are places to start from."""
        verdict = Verdict.start(self, graph, budget_bytes, SearchClass.FREE)
        known = [judge(graph, s) for s in hints.schedules if violation(graph, s.order) is None]
        candidates = [judge(graph, Schedule.store_all(graph)), *known]
        best = cheapest(candidates, budget_bytes)
        if verdict.below_floor or (best is not None and best.overhead == 0):
            return verdict.conclude(candidates)
        if not find_spec("numba"):
            message = "local search needs numba: pip install numba"
            return verdict.conclude(candidates, hit_limit=True, message=message)
        from solvers.free_order.annealer import warm_up

        warm_up()
        search = _Search(self, verdict, candidates, hints)
        return search.run([c.schedule.order for c in known])


class _Search:
    """One solve: the candidates met so far, and the time that is left."""

    def __init__(self, options: LocalSearch, verdict: Verdict, candidates: list[Candidate], hints: Hints) -> None:
        self.options, self.verdict, self.candidates, self.hints = options, verdict, candidates, hints
        self.began = time.monotonic()
        self.trace: list[str] = []

    @property
    def best(self) -> Candidate | None:
        """The cheapest candidate that fits."""
        return cheapest(self.candidates, self.verdict.budget_bytes)

    @property
    def seconds_left(self) -> float:
        """Until the time limit."""
        return self.options.time_limit_seconds - (time.monotonic() - self.began)

    def run(self, known: Sequence[Sequence[int]]) -> Solution:
        """Reorder, unless there is a schedule to start from; then walk."""
        from solvers.free_order.annealer import FreeOrderAnnealer

        graph, best = self.verdict.graph, self.best
        annealer = FreeOrderAnnealer(graph)
        start: Sequence[int] = best.schedule.order if best is not None else range(len(graph))
        if best is None:
            start = min(known, key=annealer.peak_bytes) if known else self._better_order(graph)
        interrupted = False
        try:
            self._walk_all(annealer, start)
        except KeyboardInterrupt:
            if self.best is None:
                raise
            interrupted = True
        hit_limit = self.best is None or self.best.overhead > 0
        return self.verdict.conclude(
            self.candidates, hit_limit=hit_limit, interrupted=interrupted, trace=tuple(self.trace)
        )

    def _walk_all(self, annealer: FreeOrderAnnealer, start: Sequence[int]) -> None:
        from solvers.free_order.annealer import HOT, POLISH, RECOMPUTATION

        graph = self.verdict.graph
        walks = max(MIN_WALKS, min(MAX_WALKS, OPERATORS_OF_ALL_WALKS // len(graph)))
        for number in range(walks):
            best = self.best
            if (best is not None and best.overhead == 0) or self.seconds_left <= 0:
                break
            last = number == walks - 1
            cool = best is not None and last
            origin = best.schedule.order if cool and best is not None else start
            warm = HOT if walks > MIN_WALKS and number % 2 else RECOMPUTATION
            self._walk(annealer, origin, (number, walks), POLISH if cool else warm)

    def _better_order(self, graph: Graph) -> Sequence[int]:
        limit = self.options.move_limit
        search = OrderSearch(
            moves=200_000 if limit is None else limit // 4,
            moves_per_operator=400 if limit is None else 0,
            time_limit_seconds=min(10.0, self.options.time_limit_seconds / 4),
            seed=self.options.seed,
        )
        found = search.best(graph, self.verdict.budget_bytes)
        self._take(found.order, f"order by {found.search}")
        return found.order

    def _walk(
        self, annealer: FreeOrderAnnealer, origin: Sequence[int], walk: tuple[int, int], cooling: Cooling
    ) -> None:
        """One walk; `walk` is its number and how many there are."""
        from solvers.free_order.annealer import Effort

        number, walks = walk
        limit, budget_bytes = self.options.move_limit, self.verdict.budget_bytes
        effort = Effort(self.seconds_left / (walks - number), None if limit is None else max(1, limit // walks))
        walked = annealer.anneal(
            origin,
            budget_bytes,
            seed=self.options.seed + number,
            effort=effort,
            cooling=cooling,
            stop=lambda percent: percent <= 0,
        )
        found = walked.last if walked.best is None else annealer.reduce(walked.best, budget_bytes)
        self._take(found, f"walk {number + 1}, {walked.moves:,} moves")

    def _take(self, order: Sequence[int], what: str) -> None:
        candidate = judge(self.verdict.graph, Schedule.from_order(self.verdict.graph, order))
        self.candidates.append(candidate)
        self.trace.append(f"{what}: overhead {candidate.overhead:.4%}, peak {candidate.peak_bytes:,} bytes")
        best = self.best
        self.hints.report(
            Progress(
                solver=self.options.name,
                stage=what,
                seconds=time.monotonic() - self.began,
                time_limit_seconds=self.options.time_limit_seconds,
                overhead=float("inf") if best is None else best.overhead,
                lower_bound=0.0,
            )
        )
