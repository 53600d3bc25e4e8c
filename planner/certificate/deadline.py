"""When the search for a proof ends: at a time, or at Ctrl-C; and who is told how far it is."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from solvers.hints import Progress, ProgressListener


@dataclass
class Deadline:
    """The end of one search for a proof.

    **Fields:**

    - `limit_seconds`: from the making of this object on.
    - `step_seconds`, `overhead`: of the step, and of the schedule that is certified (`inf` if nothing fits): what the
      listener is told beside the bound.
    """

    limit_seconds: float
    step_seconds: float = 0.0
    overhead: float = math.inf
    progress: ProgressListener | None = None
    _began: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        """Negative once it has passed."""
        return self.limit_seconds - (time.monotonic() - self._began)

    @property
    def passed(self) -> bool:
        """Whether the search must end with what it has."""
        return self.seconds_left <= 0.0

    def say(self, stage: str, bound_seconds: float) -> None:
        """Tell the listener what is proven by now."""
        if self.progress is not None:
            bound = bound_seconds / self.step_seconds if self.step_seconds else 0.0
            seconds = time.monotonic() - self._began
            self.progress(Progress("certificate", stage, seconds, self.limit_seconds, self.overhead, bound))

    @contextmanager
    def interruptible(self) -> Generator[None]:
        """Ctrl-C inside of it ends the search and nothing else: what is proven by then is proven."""
        try:
            yield
        except KeyboardInterrupt:
            self.limit_seconds = -math.inf
