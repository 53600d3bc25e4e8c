"""What the caller suggests: orders to judge, the quick ones at once, the slow ones where the gap stays open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from solvers.hints import Suggestion
from solvers.snapshot.relaxation import PERCENT
from solvers.snapshot.walks import MENDABLE

if TYPE_CHECKING:
    from solvers.snapshot.search import Search

UNCOMPILED_OPERATORS, UNCOMPILED_SUGGESTIONS = 300, 12
"""On larger graphs suggestions wait for compiled code; without it so many are tried after each answer of the engine."""

SLOW_SECONDS, SLOW_SHARE, SLOW_ROUND = 10.0, 0.2, 3
"""Slow suggestions are asked for where the time limit is at least so long, once this share of it has passed; under a
`work_limit` from this round on."""


@dataclass
class Suggestions:
    """The suggestions of one search; those that are better become its incumbent."""

    search: Search
    _quick: Iterator[Suggestion] = field(init=False, repr=False)
    _slow: Iterator[Suggestion] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        def made_by(suggest: Callable[[], Iterable[Suggestion]] | None) -> Iterator[Suggestion]:
            return iter(suggest() if suggest is not None else ())

        hints = self.search.hints
        self._quick, self._slow = made_by(hints.suggest), made_by(hints.suggest_slowly)

    @property
    def slow_to_judge(self) -> bool:
        """Whether the graph is so large that the simulator alone takes long."""
        return len(self.search.graph) > UNCOMPILED_OPERATORS

    def consider(self, stop: Callable[[], bool] | None = None) -> None:
        """Offer what the caller suggests, one order after the other; what nearly fits is annealed next.

        `stop` ends it; without one it goes on, but not for long where the simulator has to judge large graphs.
        """
        search, count = self.search, 0
        while not (stop and stop()) and search.remaining_seconds() > 0.0 and not search.closed():
            if stop is None and count >= UNCOMPILED_SUGGESTIONS and self.slow_to_judge and search.annealer is None:
                break
            suggestion = self._next()
            if suggestion is None:
                break
            count += 1
            search.incumbent.offer(list(suggestion.order), suggestion.by)
        if count:
            search.log(f"{count} suggestions tried")
        if stop and stop():
            return
        miss = search.incumbent.take_near_miss()
        reached = search.incumbent.percent <= miss.percent + PERCENT * search.options.gap
        if miss.ratio < MENDABLE and not reached and not search.closed():
            search.walks.mend(miss.order, max(1.0, 0.12 * search.options.time_limit_seconds))

    def _next(self) -> Suggestion | None:
        suggestion = next(self._quick, None)
        if suggestion is None and self._may_ask_slowly():
            suggestion = next(self._slow, None)
        return suggestion

    def _may_ask_slowly(self) -> bool:
        """Whether the gap has been open for so long that suggestions may take seconds."""
        search, limit = self.search, self.search.options.time_limit_seconds
        if search.options.work_limit is not None:
            return search.rounds >= SLOW_ROUND
        return limit >= SLOW_SECONDS and search.remaining_seconds() < (1.0 - SLOW_SHARE) * limit
