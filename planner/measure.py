"""``measure_step``: what one training step really needs, for any model, planned or not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from graph_capture.allocator import AllocatorTrace

LossFn = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class StepMeasurement:
    """One training step, measured.

    **Fields:**

    - `peak_bytes`: the most bytes in memory at any instant, resident ones included.
    - `resident_bytes`: parameters, buffers, inputs, and `.grad` where the step accumulates.
    - `seconds`: median over the repeats, without the profiler. `loss`: its value.
    - `exact`: whether every allocation was seen (CPU), or the allocator's own maximum was read (CUDA).
    """

    peak_bytes: int
    resident_bytes: int
    seconds: float
    loss: float
    exact: bool = True


def measure_step(
    model: nn.Module,
    *args: Any,
    loss_fn: LossFn | None = None,
    gradient_accumulation: bool = False,
    repeats: int = 1,
    **kwargs: Any,
) -> StepMeasurement:
    """Measure forward, loss and backward of one step. Gradients, buffers and the random state are left as they were.

    **Arguments:**

    - `args`, `kwargs`: as the model is called. `loss_fn`: as in :func:`planner.plan`; without it the model's own loss,
      or the sum of its outputs.
    - `gradient_accumulation`: measure a later micro-batch, which finds `.grad` there, instead of a first one.
    - `repeats`: timed repetitions.

    The model's output is held until the backward has ended, as the prediction assumes.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]
    buffers = [b.detach().clone() for b in model.buffers()]
    random_state = torch.get_rng_state()
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    input_gradients = [t.grad if t.is_leaf else None for t in inputs]

    def start(accumulate: bool) -> None:
        torch.set_rng_state(random_state)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if accumulate else None

    def step() -> float:
        output = model(*args, **kwargs)
        loss = loss_of(output, loss_fn)
        loss.backward()
        return float(loss.detach())

    try:
        start(False)
        step()  # compiles, and fills the caches of kernel libraries
        start(gradient_accumulation)
        resident = _storage_bytes([*model.parameters(), *model.buffers(), *inputs, *(p.grad for p in parameters)])
        peak, loss = _peak(step, resident, next((p.device for p in parameters), torch.device("cpu")))
        seconds = []
        for _ in range(repeats):
            start(gradient_accumulation)
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
    finally:
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for tensor, gradient in zip(inputs, input_gradients, strict=True):
            if tensor.is_leaf:
                tensor.grad = gradient
        torch.set_rng_state(random_state)
    return StepMeasurement(peak, resident, statistics.median(seconds), loss, parameters[0].device.type == "cpu")


def loss_of(output: Any, loss_fn: LossFn | None = None) -> torch.Tensor:
    """The loss of a model's output: by `loss_fn`, its own `loss`, its one scalar, or the sum of all that is trained."""
    if loss_fn is not None:
        return loss_fn(output)
    named = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(named, torch.Tensor):
        return named
    trained = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    if len(trained) == 1 and trained[0].dim() == 0:
        return trained[0]
    scalars = [t for t in trained if t.dim() == 0]
    return scalars[0] if len(scalars) == 1 else torch.stack([t.sum() for t in trained]).sum()


def _peak(step: Callable[[], float], resident: int, device: torch.device) -> tuple[int, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        loss = step()
        return torch.cuda.max_memory_allocated(device), loss
    with AllocatorTrace(collect=True) as trace:
        loss = step()
    return resident + trace.peak_bytes, loss


def _storage_bytes(tensors: list[Any]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())
