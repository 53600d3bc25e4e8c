"""Seconds of an operator as the device at hand takes them: each distinct call is timed once, and remembered.

A call is distinct by its operator, the shapes, strides, offsets and dtypes of its tensors, and its other arguments. It
runs on zeros of its own, warmed up once, and the median of a few runs counts. So a plan made with measured seconds
knows what a roofline cannot: which kernels are far from the peak, caches, threads. It is of this machine, in its state
of this minute: two measurements differ, and so do the plans.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from graph_capture.calls import TensorSpec, freeze, tensors_in, thaw
from graph_capture.costs import CostModel, Price, Roofline
from graph_capture.devices import Device
from graph_capture.flops import flops_of
from graph_capture.workspace import OPAQUE

WANTED_SECONDS = 2e-3
"""A call is repeated until it has run this long in all, but at least `LEAST_RUNS` and at most `MOST_RUNS` times."""
LEAST_RUNS, MOST_RUNS = 3, 25


class Measured(CostModel):
    """Measured seconds; a roofline's, scaled to the measured ones, where a call cannot be tried alone.

    **Fields:**

    - `device_type`: `"cpu"` or `"cuda"`: where calls run. `limit_bytes`: calls that touch more are not tried.
    """

    def __init__(self, device: Device, device_type: str = "cpu", limit_bytes: int = 2**30) -> None:
        self.roofline = Roofline(device)
        self.device_type, self.limit_bytes = device_type, limit_bytes
        self._estimated: set[str] = set()
        self._measured_seconds = self._roofline_seconds = 0.0

    @property
    def estimated(self) -> frozenset[str]:
        """The operators that could not be tried."""
        return frozenset(self._estimated)

    def price(self, node: fx.Node) -> Price:
        """The median of a few runs, FLOPs by formula as ever."""
        estimate = self.roofline.price(node)
        seconds = self._seconds(node)
        if seconds is None:
            self._estimated.add(str(node.target))
            factor = self._measured_seconds / self._roofline_seconds if self._roofline_seconds else 1.0
            return Price(estimate.seconds * factor, estimate.flops, estimate.priced_by)
        self._measured_seconds += seconds
        self._roofline_seconds += estimate.seconds
        return Price(seconds, flops_of(node) or 0, estimate.priced_by)

    def price_of_kernel(self, moved_bytes: int, launches: int) -> Price:
        """A roofline's: there is no such kernel before a schedule says what is fused."""
        return self.roofline.price_of_kernel(moved_bytes, launches)

    def _seconds(self, node: fx.Node) -> float | None:
        """`None` if the call cannot be tried: it is opaque, mutates, is too large, or refuses zeros."""
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or target.namespace != "aten":
            return None
        if any(word in str(target) for word in OPAQUE):
            return None
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        tensors = tensors_in((args, kwargs, node.meta["val"]))
        if sum(t.untyped_storage().nbytes() for t in tensors) > self.limit_bytes:
            return None
        positional, keyword = tree_map(TensorSpec.of, (tuple(args), dict(kwargs)))
        try:
            return _timed(target, freeze(positional), freeze(keyword), self.device_type, torch.get_num_threads())
        except RuntimeError:  # under autocast some kernels refuse the dtypes that torch's shape functions say
            return None


@functools.lru_cache(maxsize=8192)
def _timed(target: Any, args: Any, kwargs: Any, device_type: str, threads: int) -> float:
    """Median seconds of one call. Leaves no trace: neither in the generators nor in a trace that may be going on."""
    del threads  # part of the key alone
    with (
        _disable_current_modes(),
        torch.random.fork_rng(devices=None if device_type == "cuda" else []),
        torch.no_grad(),
        torch._C._DisableAutocast(),
    ):
        positional, keyword = thaw(args, device_type), thaw(kwargs, device_type)
        target(*positional, **keyword)
        runs: list[float] = []
        while len(runs) < LEAST_RUNS or (sum(runs) < WANTED_SECONDS and len(runs) < MOST_RUNS):
            _wait(device_type)
            started = time.perf_counter()
            target(*positional, **keyword)
            _wait(device_type)
            runs.append(time.perf_counter() - started)
    return statistics.median(runs)


def _wait(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()
