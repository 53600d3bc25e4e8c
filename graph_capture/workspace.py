"""Memory of an operator beyond its outputs' nominal sizes.

*Scratch* exists only while the operator runs; what is *retained* stays with its first output (some kernels return a
small result in the large storage that they worked in). Two models behind one interface: `MeasuredWorkspace` runs each
distinct call (target, shapes, dtypes, strides) once on the CPU at hand, alone, and reads the allocator's events; it is
exact for the CPU that trains. `DeclaredWorkspace` bounds it by formula, for a device that is not here or operators too
large to try: convolutions may re-order their input, weight and output once, matrix libraries keep a workspace.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from graph_capture.allocator import AllocatorTrace
from graph_capture.calls import TensorSpec, freeze, tensors_in, thaw

OPAQUE = ("rnn", "lstm", "gru")
"""Operators that read state of a library from a tensor; called with zeros they crash the process."""


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
SLOW_PRODUCT_FLOPS = 2**27
"""Matrix products of half-precision numbers that the CPU has no instructions for run at some 0.3 GFLOP/s: larger ones
are not tried. Torch's own kernels for them work in the result alone, as they do at every smaller size."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one call beyond its outputs: `scratch` while it runs, `retained` with its first output."""

    scratch: int = 0
    retained: int = 0


class WorkspaceModel(abc.ABC):
    """Says what one operator call needs beyond its outputs."""

    @abc.abstractmethod
    def footprint(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Footprint:
        """Footprint of `target(*args, **kwargs)`; tensors may be fake, `result` is what the call returns."""

    def of_node(self, node: fx.Node) -> Footprint:
        """Footprint of a node of a joint graph."""
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        return self.footprint(node.target, args, kwargs, node.meta.get("val"))

    def of_kernel(self, scratch_bytes: int) -> Footprint:
        """Footprint of a kernel that a compiler generates, which is known to need so much."""
        return Footprint(scratch_bytes)


class NoWorkspace(WorkspaceModel):
    """Every operator works in its outputs."""

    def footprint(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Footprint:
        """Always nothing."""
        return Footprint()

    def of_kernel(self, scratch_bytes: int) -> Footprint:
        """Always nothing."""
        return Footprint()


class DeclaredWorkspace(WorkspaceModel):
    """A declared bound by kind of operator; `library_bytes` is what a matrix library keeps (cuBLAS, cuBLASLt)."""

    def __init__(self, library_bytes: int = 0) -> None:
        self.library_bytes = library_bytes

    def footprint(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Footprint:
        """Convolutions: input, weight and output once more. Matrix products: the library's workspace."""
        name = str(target)
        if "convolution" in name:
            return Footprint(sum(t.numel() * t.element_size() for t in tensors_in((args, kwargs, result))))
        return Footprint(self.library_bytes if "mm" in name or "attention" in name else 0)


class MeasuredWorkspace(WorkspaceModel):
    """Tries each distinct call once on the CPU. Calls that touch more than `limit_bytes` fall back to `fallback`.

    The names of the operators that were measured and of those that fell back are kept, for the report.
    """

    def __init__(self, limit_bytes: int = 2**28, fallback: WorkspaceModel | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.fallback = fallback or DeclaredWorkspace()
        self.measured: set[str] = set()
        self.declared: set[str] = set()

    def footprint(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Footprint:
        """Measured; the fallback's bound for calls that are too large or not safe to try alone."""
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
            return Footprint()
        tensors = tensors_in((args, kwargs, result))
        if not tensors_in(result):
            return Footprint()
        if target.namespace != "aten" or any(word in str(target) for word in OPAQUE):
            self.declared.add(str(target))
            return self.fallback.footprint(target, args, kwargs, result)
        too_large = sum(t.untyped_storage().nbytes() for t in tensors) > self.limit_bytes
        if too_large or any(t.device.type != "cpu" for t in tensors) or _is_slow(target, args, result):
            self.declared.add(str(target))
            return self.fallback.footprint(target, args, kwargs, result)
        positional, keyword = tree_map(TensorSpec.of, (tuple(args), dict(kwargs)))
        try:
            footprint = _measure(target, freeze(positional), freeze(keyword))
        except RuntimeError:
            # Under autocast some kernels return other dtypes than torch's shape functions say, and then refuse those.
            self.declared.add(str(target))
            return self.fallback.footprint(target, args, kwargs, result)
        self.measured.add(str(target))
        return footprint


def _is_slow(target: torch._ops.OpOverload, args: Sequence[Any], result: Any) -> bool:
    """Whether a call is a large matrix product in a precision that the CPU at hand has to emulate."""
    packet = target.overloadpacket
    if packet.__name__ not in PRODUCTS or has_fast_products(result.dtype):
        return False
    return int(flop_registry[packet](*args, out_val=result)) > SLOW_PRODUCT_FLOPS


def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether matrix products of `dtype` have instructions on the CPU at hand, and a library that uses them."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


@functools.lru_cache(maxsize=4096)
def _measure(target: Any, args: Any, kwargs: Any) -> Footprint:
    # The measurement must leave no trace: random operators would advance the generator.
    # And it may be asked for in the middle of a trace, whose modes would swallow every allocation.
    # Nor may autocast change the dtypes that were recorded.
    with (
        _disable_current_modes(),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        torch._C._DisableAutocast(),
    ):
        positional, keyword = thaw(args), thaw(kwargs)
        footprint = _traced(target, positional, keyword)
        if footprint.retained:  # by the result, or by caches of the kernel library, which only a first call fills
            footprint = _traced(target, positional, keyword)
    return footprint


def _traced(target: Any, positional: Any, keyword: Any) -> Footprint:
    with AllocatorTrace() as trace:
        result = target(*positional, **keyword)
    given = {t.untyped_storage()._cdata for t in tensors_in((positional, keyword))}
    made = {t.untyped_storage()._cdata: t for t in tensors_in(result)}
    nominal = sum(t.numel() * t.element_size() for key, t in made.items() if key not in given)
    retained = max(0, trace.end_bytes - nominal)
    return Footprint(max(0, trace.peak_bytes - trace.end_bytes), retained)
