"""Walks from sequences at hand by annealing: mend what does not fit, come nearer to the budget, polish what fits."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from solvers.snapshot.anneal import Cooling

if TYPE_CHECKING:
    from solvers.free_order.annealer import FreeOrderAnnealer
    from solvers.snapshot.search import Search

MOVES_PER_ROUND, POLISH_MOVES_PER_ROUND = 20_000, 100_000
"""Deterministic work of one round under a `work_limit`."""

APPROACHES = 6
"""Walks towards the budget per round while nothing fits: all of the way, half of it, a quarter ..."""

MENDABLE = 1.6
"""A lifted sequence whose peak is below this multiple of the budget is worth annealing."""

MENDING = Cooling()


@dataclass
class Walks:
    """The walks of one search; what they find becomes the search's incumbent if it is better."""

    search: Search
    walker: FreeOrderAnnealer | None = None

    def mend(self, order: list[int], seconds: float, in_between: bool = False) -> None:
        """Anneal a sequence that does not fit until the gap is closed or the time is over.

        `in_between`: also only until an engine answers.
        """
        search = self.search
        seconds = min(seconds, search.remaining_seconds())
        annealer = search.annealer
        if annealer is None or seconds <= 0.0:
            return
        result = annealer.anneal(
            order,
            search.budget_bytes,
            seed=search.options.seed + search.rounds,
            cooling=MENDING,
            seconds=seconds,
            moves=MOVES_PER_ROUND if search.options.work_limit is not None else None,
            stop=lambda percent: self._enough(percent, in_between),
        )
        if result.best is None:
            search.incumbent.consider(result.last, "annealing")
        else:
            search.incumbent.consider(annealer.polish(result.best, search.budget_bytes), "annealing")
        search.log(f"mended: {result.percent:.3f} % after {result.moves} moves")

    def approach(self, seconds: float) -> None:
        """While nothing fits: from the sequence of the smallest peak towards the budget, a part of the way at a time.

        Annealing finds what fits a slightly smaller budget where from far above it finds nothing.
        """
        search = self.search
        limited = search.options.work_limit is not None
        until = time.monotonic() + (search.remaining_seconds() if limited else min(seconds, search.remaining_seconds()))
        for attempt in range(APPROACHES):
            before, lowest = search.incumbent.smallest_peak_bytes, search.incumbent.lowest
            left = until - time.monotonic()
            if search.annealer is None or lowest is None or search.incumbent.order is not None or left <= 0.0:
                return
            aim = max(search.budget_bytes, before - max(1, (before - search.budget_bytes) >> min(attempt, 4)))
            result = search.annealer.anneal(
                lowest,
                aim,
                seed=search.options.seed + search.rounds * APPROACHES + attempt,
                cooling=MENDING,
                seconds=left / (APPROACHES - attempt),
                moves=MOVES_PER_ROUND // 2 if limited else None,
                stop=math.isfinite,
            )
            if result.best is not None:
                search.incumbent.consider(result.best, "annealing")
            search.log(f"approached {aim} bytes: {search.incumbent.smallest_peak_bytes}, before {before}")

    def polish(self, seconds: float, in_between: bool = False) -> None:
        """Walk from the best sequence, which fits, by moves that cost the logarithm of its length."""
        search = self.search
        seconds = min(seconds, search.remaining_seconds())
        if search.annealer is None or search.incumbent.order is None or seconds <= 0.0:
            return
        if search.graph.released:  # those moves know nothing of the turn
            self.mend(search.incumbent.order, seconds, in_between)
            return
        from solvers.free_order.annealer import POLISH, Effort, FreeOrderAnnealer

        self.walker = self.walker or FreeOrderAnnealer(search.graph, captured_order=True)
        moves = POLISH_MOVES_PER_ROUND if search.options.work_limit is not None else None
        walked = self.walker.anneal(
            self.walker.reduce(search.incumbent.order, search.budget_bytes),
            search.budget_bytes,
            seed=search.options.seed + search.rounds,
            effort=Effort(seconds if moves is None else max(0.1, search.remaining_seconds()), moves),
            cooling=POLISH,
            stop=lambda percent: self._enough(percent, in_between),
        )
        if walked.best is not None:
            search.incumbent.consider(self.walker.reduce(walked.best, search.budget_bytes), "annealing")
        search.log(f"polished: {search.incumbent.percent:.3f} % after {walked.moves} moves")

    def _enough(self, percent: float, in_between: bool) -> bool:
        """Whether a walk whose best has so many percent may end."""
        search = self.search
        return search.reached(percent) or search.remaining_seconds() <= 0.0 or (in_between and search.pool.answered())
