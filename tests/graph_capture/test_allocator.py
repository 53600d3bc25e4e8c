"""Windows of the allocator's traces: on the CPU from events, on CUDA from the allocator's own account."""

from __future__ import annotations

import pytest
import torch

from graph_capture.allocator import AllocatorTrace, CudaTrace, Window


def test_windows_on_the_cpu() -> None:
    with AllocatorTrace(collect=True) as trace:
        assert trace.mark() == 0
        kept = torch.zeros(1000)
        assert trace.mark() == 1
        temporary = torch.zeros(5000)
        del temporary
        assert trace.mark() == 2
        assert trace.mark() == 3
        del kept
    assert trace.windows == [Window(0, 4000), Window(4000, 24_000), Window(4000, 4000), Window(4000, 4000)]


def test_what_comes_before_the_first_mark_is_in_no_window() -> None:
    with AllocatorTrace(collect=True) as trace:
        kept = torch.zeros(1000)
        trace.mark()
    assert trace.windows == [Window(kept.nbytes, kept.nbytes)]
    with AllocatorTrace() as trace:
        torch.zeros(1000)
    assert trace.windows == []


class Card:
    """CUDA's account of one device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.level = self.most = 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.level)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device: torch.device) -> None:
        assert device.type == "cuda"
        self.most = self.level

    def allocate(self, size_bytes: int) -> None:
        self.level += size_bytes
        self.most = max(self.most, self.level)


def test_windows_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    card.allocate(100)
    with CudaTrace(torch.device("cuda")) as trace:
        card.allocate(50)
        assert trace.mark() == 0
        card.allocate(1000)
        card.allocate(-900)
        assert trace.mark() == 1
        card.allocate(-200)
        card.allocate(10)
    assert trace.windows == [Window(150, 1150), Window(250, 250)]
