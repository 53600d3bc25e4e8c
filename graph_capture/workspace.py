"""Scratch memory that an operator needs only while it runs, beyond its outputs.

Two models behind one interface. `MeasuredWorkspace` runs each distinct operator (target, shapes, dtypes, strides) once
on the CPU at hand, alone, and reads the allocator's events; it is exact for the CPU that trains. `DeclaredWorkspace`
bounds it by formula, for a device that is not here or operators too large to try: convolutions may re-order their
input, weight and output once, attention keeps a block of scores per thread.
"""

from __future__ import annotations

import abc
import functools
from typing import Any

import torch
from torch import fx

from graph_capture.allocator import AllocatorTrace
from graph_capture.joint import is_mutation, tensors_of

ALIGNMENT_BYTES = 64


class WorkspaceModel(abc.ABC):
    """Bounds the scratch memory of one operator of a joint graph."""

    @abc.abstractmethod
    def workspace_bytes(self, node: fx.Node) -> int:
        """Bytes that exist only while `node` runs, its inputs and outputs not counted."""


class NoWorkspace(WorkspaceModel):
    """Every operator works in its outputs."""

    def workspace_bytes(self, node: fx.Node) -> int:
        """Always 0."""
        return 0


class DeclaredWorkspace(WorkspaceModel):
    """A declared bound by kind of operator; `library_bytes` is what a matrix library keeps (cuBLAS, cuBLASLt)."""

    def __init__(self, library_bytes: int = 0) -> None:
        self.library_bytes = library_bytes

    def workspace_bytes(self, node: fx.Node) -> int:
        """Convolutions: input, weight and output once more. Matrix products: the library's workspace."""
        name = str(node.target)
        if "convolution" in name:
            tensors = [t for n in (*node.all_input_nodes, node) for t in tensors_of(n)]
            return sum(t.numel() * t.element_size() for t in tensors)
        if any(key in name for key in ("mm", "attention")):
            return self.library_bytes
        return 0


class MeasuredWorkspace(WorkspaceModel):
    """Tries each distinct operator once on the CPU. Operators above `limit_bytes` fall back to `fallback`.

    The names of the operators that were measured and of those that fell back are kept, for the report.
    """

    def __init__(self, limit_bytes: int = 2**28, fallback: WorkspaceModel | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.fallback = fallback or DeclaredWorkspace()
        self.measured: set[str] = set()
        self.declared: set[str] = set()

    def workspace_bytes(self, node: fx.Node) -> int:
        """Measured workspace; the fallback's bound for operators that are too large to try."""
        if not isinstance(node.target, torch._ops.OpOverload) or is_mutation(node):
            return 0
        tensors = [t for n in (*node.all_input_nodes, node) for t in tensors_of(n)]
        too_large = sum(t.untyped_storage().nbytes() for t in tensors) > self.limit_bytes
        if too_large or any(t.device.type != "cpu" for t in tensors):
            self.declared.add(str(node.target))
            return self.fallback.workspace_bytes(node)
        self.measured.add(str(node.target))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Spec.of(n.meta["val"]))
        return _measure(node.target, _freeze(args), _freeze(kwargs))


class _Spec(tuple):  # type: ignore[type-arg]
    """Shape, strides, offset, dtype and storage size of a tensor: all that its kernel's workspace depends on."""

    @staticmethod
    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage().nbytes() // value.element_size()
            offset = value.storage_offset()
            return _Spec((tuple(value.shape), value.stride(), offset, value.dtype, storage))
        return value

    def make(self) -> torch.Tensor:
        shape, stride, offset, dtype, storage = self
        # Zeros are valid as indices, probabilities and weights alike.
        return torch.zeros(storage, dtype=dtype).as_strided(shape, stride, offset)


def _freeze(item: Any) -> Any:
    if isinstance(item, _Spec):
        return item
    if isinstance(item, dict):
        return ("dict", tuple((k, _freeze(v)) for k, v in sorted(item.items())))
    if isinstance(item, (list, tuple)):
        return ("list", tuple(_freeze(v) for v in item))
    return item


def _thaw(item: Any) -> Any:
    if isinstance(item, _Spec):
        return item.make()
    if isinstance(item, tuple) and len(item) == 2 and item[0] == "dict":
        return {k: _thaw(v) for k, v in item[1]}
    if isinstance(item, tuple) and len(item) == 2 and item[0] == "list":
        return [_thaw(v) for v in item[1]]
    return item


@functools.lru_cache(maxsize=4096)
def _measure(target: Any, args: Any, kwargs: Any) -> int:
    # The measurement must leave no trace: random operators would advance the generator.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        positional, keyword = _thaw(args), _thaw(kwargs)
        target(*positional, **keyword)  # the first call may fill caches of the kernel library
        with AllocatorTrace() as trace:
            result = target(*positional, **keyword)
    kept = trace.end_bytes
    del result
    return max(0, trace.peak_bytes - kept)
