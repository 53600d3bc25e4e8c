"""What eager PyTorch would need: one step of the model's fake copy, its storages counted as they come and go.

A percentage of a budget refers to this peak. Nothing is computed and nothing is allocated: the step runs on fake
tensors, whose storages live and die where the real ones would.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graph_capture.huggingface import as_in_eager
from graph_capture.workspace import WorkspaceModel

LossOf = Callable[[Any], torch.Tensor]


def rounded_up(size_bytes: int, unit_bytes: int) -> int:
    """The least multiple of `unit_bytes` that holds `size_bytes`."""
    return -(-size_bytes // unit_bytes) * unit_bytes


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of the storages that operators return while any tensor holds them, workspace included."""

    def __init__(self, workspace: WorkspaceModel, known: Sequence[torch.Tensor], unit_bytes: int = 1) -> None:
        super().__init__()
        self.workspace, self.unit_bytes = workspace, unit_bytes
        self.live_bytes = self.peak_bytes = 0
        self.sizes: dict[int, int] = {}
        self.references: dict[int, Any] = {}
        self.known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and take note of what it makes."""
        result = func(*args, **(kwargs or {}))
        footprint = self.workspace.footprint(func, args, kwargs or {}, result)
        retained = footprint.retained
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._add(tensor, retained):
                retained = 0
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + footprint.scratch)
        return result

    def _add(self, tensor: torch.Tensor, retained: int) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes or key in self.known:
            return False
        self.sizes[key] = rounded_up(storage.nbytes() + retained, self.unit_bytes)
        self.live_bytes += self.sizes[key]

        def gone(_: Any, key: int = key) -> None:
            self.references.pop(key, None)
            self.live_bytes -= self.sizes.pop(key, 0)

        self.references[key] = weakref.ref(storage, gone)
        return True


def eager_peak_bytes(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss_of: LossOf,
    *,
    mode: FakeTensorMode,
    workspace: WorkspaceModel,
    gradient_accumulation: bool,
    unit_bytes: int = 1,
) -> int:
    """Peak above what is resident of one eager step on fake tensors: forward, loss and backward.

    With `gradient_accumulation` a later micro-batch is counted: the `.grad` that is there from the start is included.
    Sizes are multiples of `unit_bytes`, as the device's allocator hands them out. The output is held until the end of
    the backward, as most training loops hold it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with mode:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if gradient_accumulation else None
        sizes = (p.grad.untyped_storage().nbytes() for p in parameters if p.grad is not None)
        accumulated = sum(rounded_up(size, unit_bytes) for size in sizes)
        known = [*model.parameters(), *model.buffers(), *(p.grad for p in parameters if p.grad is not None)]
        known += [t for t in tree_leaves((args, dict(kwargs))) if isinstance(t, torch.Tensor)]
        try:
            with as_in_eager(), StorageTracker(workspace, known, unit_bytes) as tracker:
                output = model(*args, **kwargs)
                loss = loss_of(output)
                loss.backward()
                del output, loss
        finally:
            for parameter in parameters:
                parameter.grad = None
    return accumulated + tracker.peak_bytes
