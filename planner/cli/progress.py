"""Progress on stderr while a solver works: stage, best and bound so far, gap, time left. Silent where nobody looks.

With rich the line has a spinner and the time left runs; without it the line is rewritten at every event. Ctrl-C ends
the search: the solver returns the best schedule so far, if it has one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shutil
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, TextIO

from graph_capture.formats import format_bytes, format_fraction

if TYPE_CHECKING:
    from solvers.hints import Progress, ProgressListener

CAPTURING = "capturing the training step"
DRAWING = "drawing"
_CLEAR = "\r\x1b[K"


@contextlib.contextmanager
def progress_on(stream: TextIO, stage: str = "") -> Generator[ProgressListener | None]:
    """A listener that writes to `stream` if that is a terminal, else `None`; the line is gone at the end.

    **Arguments:**

    - `stage`: what is done before the first event, such as :data:`CAPTURING`; said with the seconds that it takes.
    """
    if not stream.isatty():
        yield None
        return
    show = _rich if importlib.util.find_spec("rich") is not None else _plain
    with show(stream) as update:
        if stage:
            began = time.monotonic()
            update(lambda: f"{stage} | {time.monotonic() - began:.0f} s so far")
        yield lambda progress: update(_Line(progress))


class _Line:
    """The text of one event; the time left goes on while nothing else happens."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.since = progress, time.monotonic()

    def __call__(self) -> str:
        return line_of(self.progress, time.monotonic() - self.since)


def line_of(progress: Progress, waited_seconds: float = 0.0) -> str:
    """One line for an event that came `waited_seconds` ago; figures first, since a narrow terminal cuts the end off."""
    found = math.isfinite(progress.overhead)
    parts = _smallest(progress) if progress.peak_bytes is not None else _figures(progress)
    seconds = progress.seconds + waited_seconds
    limit = progress.time_limit_seconds
    if limit is None or math.isinf(limit):
        parts.append(f"{seconds:.0f} s so far")
    else:
        parts.append(f"at most {max(0.0, limit - seconds):.0f} s left")
    interrupt = "Ctrl-C takes the best" if found else "Ctrl-C stops"
    return " | ".join([*parts, interrupt, f"{progress.solver}, {progress.stage}"])


def _figures(progress: Progress) -> list[str]:
    parts: list[str] = []
    if math.isfinite(progress.overhead):
        parts.append(f"best {format_fraction(progress.overhead)}")
    parts.append(f"bound {format_fraction(progress.lower_bound)}")
    if math.isfinite(progress.gap):
        parts.append(f"gap {format_fraction(max(0.0, progress.gap))}")
    return parts


def _smallest(progress: Progress) -> list[str]:
    """The figures of a search for the smallest budget."""
    peak, bound = progress.peak_bytes or 0, progress.lower_bound_bytes or 0
    sizes = format_bytes(peak, short=True), format_bytes(bound, short=True)
    return [f"best {sizes[0]}", f"bound {sizes[1]}", f"gap {format_fraction((peak - bound) / peak if peak else 0.0)}"]


_Update = Callable[[Callable[[], str]], None]


@contextlib.contextmanager
def _plain(stream: TextIO) -> Generator[_Update]:
    def update(text: Callable[[], str]) -> None:
        width = shutil.get_terminal_size().columns
        stream.write(f"{_CLEAR}{text()[: width - 1]}")
        stream.flush()

    try:
        yield update
    finally:
        stream.write(_CLEAR)
        stream.flush()


@contextlib.contextmanager
def _rich(stream: TextIO) -> Generator[_Update]:
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

    class Ticking:
        """Asks for the text at every refresh."""

        def __init__(self) -> None:
            self.spinner = Spinner("dots")
            self.text: Callable[[], str] = lambda: ""

        def __rich__(self) -> Spinner:
            self.spinner.update(text=Text(self.text()[: console.width - 3]))
            return self.spinner

    console = Console(file=stream)
    ticking = Ticking()
    with Live(ticking, console=console, refresh_per_second=8, transient=True):

        def update(text: Callable[[], str]) -> None:
            ticking.text = text

        yield update
