"""What a caller may tell a solver before it starts, and what a solver tells while it works.

Hints never change what is true: a schedule is judged again, a bound is used only where its scope is the solver's own,
and every solver may ignore them. With a work limit, the same hints give the same solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from solvers.schedule import Schedule

if TYPE_CHECKING:
    from solvers.solution import Solver


@dataclass(frozen=True)
class Progress:
    """Where a solve stands.

    **Fields:**

    - `solver`, `stage`: who works, and at what, in a few words.
    - `seconds`, `time_limit_seconds`: since the start, and when it will end at the latest (`None`: no such limit).
    - `overhead`: of the best verified schedule so far, a fraction of the store-all step; `inf` while there is none.
    - `lower_bound`: proven so far, of the solver's class of schedules.
    - `peak_bytes`, `lower_bound_bytes`: where the smallest budget is looked for, what is known to work, and below what
      nothing does; `None` everywhere else.
    """

    solver: str
    stage: str
    seconds: float
    time_limit_seconds: float | None
    overhead: float
    lower_bound: float
    peak_bytes: int | None = None
    lower_bound_bytes: int | None = None

    @property
    def gap(self) -> float:
        """Overhead minus lower bound, as a fraction of the store-all step."""
        return self.overhead - self.lower_bound


@dataclass(frozen=True)
class Suggestion:
    """An order of executions (see :meth:`Schedule.from_order`) that may be worth starting from, and whose it is."""

    by: str
    order: Sequence[int]


ProgressListener = Callable[[Progress], None]


@dataclass(frozen=True)
class Hints:
    """What is known already.

    **Fields:**

    - `schedules`: schedules of the same graph, within the budget or not: candidates, and places to start from.
    - `lower_bound`: no schedule of the *ordered* class within the budget has less overhead (a fraction of the store-all
      step). A bound of a larger budget holds for a smaller one.
    - `suggest`: makes suggestions one after the other; asked for when the solver has time for them.
    - `suggest_slowly`: makes others, the first of which may take seconds; asked for when the gap stays open.
    - `progress`: called now and then, from the thread that solves; what it raises ends the solve.
    """

    schedules: tuple[Schedule, ...] = ()
    lower_bound: float = 0.0
    suggest: Callable[[], Iterable[Suggestion]] | None = None
    suggest_slowly: Callable[[], Iterable[Suggestion]] | None = None
    progress: ProgressListener | None = None

    def report(self, progress: Progress) -> None:
        """Tell the listener, if there is one."""
        if self.progress is not None:
            self.progress(progress)

    def starting(self, solver: Solver) -> None:
        """Tell the listener that `solver` begins: its first own event may be long in coming."""
        limit = getattr(solver, "time_limit_seconds", None)
        self.report(Progress(solver.name, "starting", 0.0, limit, math.inf, 0.0))


NO_HINTS = Hints()
