"""Progress: what the line says, silence where nobody looks, and nothing left behind on a terminal."""

from __future__ import annotations

import importlib.util
import io
import math

import pytest

from planner.cli.progress import CAPTURING, line_of, progress_on
from solvers.hints import Progress


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


EVENT = Progress("snapshot", "round 2: program solved", 4.0, 30.0, 0.1234, 0.12)


def test_the_line_says_where_the_solve_stands() -> None:
    assert line_of(EVENT, 6.0) == (
        "best 12.34 % | bound 12.00 % | gap 0.34 % | at most 20 s left | Ctrl-C takes the best | "
        "snapshot, round 2: program solved"
    )


@pytest.mark.parametrize("limit", [None, math.inf])
def test_without_a_schedule_and_a_limit(limit: float | None) -> None:
    line = line_of(Progress("checkmate", "searching", 3.0, limit, math.inf, 0.0))
    assert line == "bound 0.00 % | 3 s so far | Ctrl-C stops | checkmate, searching"


def test_a_search_for_the_smallest_budget_shows_sizes() -> None:
    event = Progress(
        "minimum budget", "probe 2", 4.0, 30.0, 0.1, 0.0, peak_bytes=4 * 2**20, lower_bound_bytes=3 * 2**20
    )
    figures = "best 4.00 MiB | bound 3.00 MiB | gap 25.00 %"
    assert line_of(event) == f"{figures} | at most 26 s left | Ctrl-C takes the best | minimum budget, probe 2"


def test_silent_where_nobody_looks() -> None:
    stream = io.StringIO()
    with progress_on(stream, CAPTURING) as listener:
        assert listener is None
    assert stream.getvalue() == ""


@pytest.mark.parametrize("library", ["rich", "nothing"])
def test_on_a_terminal(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "nothing":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        pytest.importorskip("rich", reason="rich is an optional extra")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with progress_on(stream, CAPTURING) as listener:
        assert listener is not None
        if library == "nothing":
            assert CAPTURING in stream.getvalue()
        listener(EVENT)
    written = stream.getvalue()
    assert "best 12.34 % | bound 12.00 %" in written
    assert "\x1b[K" in written or "\x1b[2K" in written  # the line is erased
    assert max(len(line) for line in written.replace("\r", "\n").splitlines()) < 100


def test_the_line_is_gone_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), progress_on(stream, CAPTURING):
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("\r\x1b[K")
