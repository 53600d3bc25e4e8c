"""Memory as the allocator sees it: exact on the CPU, from its events; on CUDA from the allocator's own account.

The resident set size of the process tells of pages, not of tensors. The profiler's memory events tell of every
allocation and release of torch's CPU allocator, workspace inside of kernels included, in program order. CUDA's caching
allocator keeps the present level and its maximum, which can be asked for at any time, without waiting for the card.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

# The profiler's back end announces every start and stop on stderr unless told otherwise before its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


_MARK = "graph_capture.allocator.mark"


@dataclass(frozen=True, slots=True)
class Window:
    """What happened from one mark to the next: the level at its start, and the most until its end."""

    start_bytes: int
    peak_bytes: int


class AllocatorTrace:
    """Context manager that records allocations of the CPU allocator relative to the level at entry.

    **Fields after exit:**

    - `peak_bytes`: the most above the level at entry. `end_bytes`: the level at exit, relative to entry.
    - `events`: (time in nanoseconds, bytes; negative for a release), in order.
    - `windows`: for each mark the time from it to the next one, or to the exit.
    """

    def __init__(self, collect: bool = False) -> None:
        self.peak_bytes = self.end_bytes = 0
        self.events: list[tuple[int, int]] = []
        self.windows: list[Window] = []
        self._collect = collect
        self._marks = 0

    def __enter__(self) -> AllocatorTrace:
        if self._collect:
            gc.collect()
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
        self._profile.__enter__()
        return self

    def mark(self) -> int:
        """Start a window; returns its number."""
        with torch.profiler.record_function(_MARK):
            self._marks += 1
        return self._marks - 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, traceback)
        results = self._profile.profiler.kineto_results  # type: ignore[union-attr]
        if results is None or error is not None:
            return
        recorded: list[Any] = results.events()
        events = [(e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]"]
        self.events = sorted(events, key=lambda event: event[0])
        level = 0
        for _, size in self.events:
            level += size
            self.peak_bytes = max(self.peak_bytes, level)
        self.end_bytes = level
        self.windows = _windows(self.events, sorted(e.start_ns() for e in recorded if e.name() == _MARK))


def _windows(events: list[tuple[int, int]], marks: list[int]) -> list[Window]:
    """The windows that start at `marks`, whose times are in order, as those of `events`."""
    windows: list[Window] = []
    level = position = 0
    for number, start in enumerate(marks):
        while position < len(events) and events[position][0] < start:
            level += events[position][1]
            position += 1
        before = peak = level
        end = marks[number + 1] if number + 1 < len(marks) else None
        while position < len(events) and (end is None or events[position][0] < end):
            level += events[position][1]
            peak = max(peak, level)
            position += 1
        windows.append(Window(before, peak))
    return windows


class CudaTrace:
    """The same windows from the account of CUDA's caching allocator; levels are absolute.

    The allocator's maximum (`torch.cuda.max_memory_allocated`) is reset at every mark.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.windows: list[Window] = []
        self._start: int | None = None

    def __enter__(self) -> CudaTrace:
        return self

    def mark(self) -> int:
        """Start a window; returns its number."""
        self._close()
        torch.cuda.reset_peak_memory_stats(self.device)
        self._start = torch.cuda.memory_allocated(self.device)
        return len(self.windows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._start is not None:
            self.windows.append(Window(self._start, torch.cuda.max_memory_allocated(self.device)))
            self._start = None
