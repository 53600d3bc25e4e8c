"""Exact memory of the CPU allocator, from its events.

The resident set size of the process tells of pages, not of tensors. The profiler's memory events tell of every
allocation and release of torch's CPU allocator, workspace inside of kernels included, in program order.
"""

from __future__ import annotations

import gc
import os
from types import TracebackType
from typing import Any

import torch

# The profiler's back end announces every start and stop on stderr unless told otherwise before its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class AllocatorTrace:
    """Context manager that records allocations of the CPU allocator relative to the level at entry.

    **Fields after exit:**

    - `peak_bytes`: the most above the level at entry. `end_bytes`: the level at exit, relative to entry.
    - `events`: (time in nanoseconds, bytes; negative for a release), in order.
    """

    def __init__(self, collect: bool = False) -> None:
        self.peak_bytes = self.end_bytes = 0
        self.events: list[tuple[int, int]] = []
        self._collect = collect

    def __enter__(self) -> AllocatorTrace:
        if self._collect:
            gc.collect()
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
        self._profile.__enter__()
        return self

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
