"""One step of a model's fake copy under PyTorch's own checkpointing: which operators run, and what memory they need.

Nothing is computed and nothing is allocated. It is torch's code that runs, so that neither the order of its
recomputation nor where it stops early has to be modelled.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graph_capture.build import CPU_RANDOM_STATE_BYTES
from graph_capture.capture import workspace_model
from graph_capture.cuda_kernels import CudaOperators
from graph_capture.devices import Device, device_by_name
from graph_capture.eager import eager_peak_bytes
from graph_capture.fake import fake_copy, fake_inputs, fake_mode_of
from graph_capture.huggingface import as_in_eager
from graph_capture.target import absent_card
from planner.errors import CaptureError, PlannerError, RewriteError
from planner.measure import LossFn, loss_of

Wrap = Callable[[nn.Module], int]
"""Wraps blocks of a model in place; returns how many."""


@dataclass(frozen=True)
class FakeStep:
    """A model with the inputs of one training step, on a device that need not be here."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss_fn: LossFn | None
    device: Device

    @classmethod
    def of(
        cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], loss_fn: LossFn | None, device: str
    ) -> FakeStep:
        """For a device by name."""
        return cls(model, tuple(args), dict(kwargs), loss_fn, device_by_name(device))

    def run(self, wrap: Wrap) -> None:
        """Forward, loss and backward of a copy with wrapped blocks."""
        mode = fake_mode_of(self.model, (self.args, self.kwargs))
        with self._around():
            twin = fake_copy(self.model, mode)
            args, kwargs = fake_inputs((self.args, dict(self.kwargs)), mode)
            wrap(twin)
            with mode, as_in_eager():
                loss_of(twin(*args, **kwargs), self.loss_fn).backward()

    def peak_bytes(self, wrap: Wrap, *, gradient_accumulation: bool) -> int:
        """Peak above what is resident, of a first or of a later micro-batch (`.grad` is counted there)."""
        mode = fake_mode_of(self.model, (self.args, self.kwargs))
        with self._around():
            twin = fake_copy(self.model, mode)
            args, kwargs = fake_inputs((self.args, dict(self.kwargs)), mode)
            wrapped = wrap(twin)
            peak = eager_peak_bytes(
                twin,
                args,
                kwargs,
                lambda result: loss_of(result, self.loss_fn),
                mode=mode,
                workspace=workspace_model(self.device),
                gradient_accumulation=gradient_accumulation,
                unit_bytes=self.device.allocation_bytes,
            )
        # Every checkpointed call holds the CPU generator's state, and so does the recomputation that is running. It is
        # taken by no operator, so it was not counted. (Of a GPU's generator it is 16 bytes, on the CPU.)
        on_cpu = not self.device.memory_bytes
        return peak + (CPU_RANDOM_STATE_BYTES * (wrapped + 1) if on_cpu and wrapped else 0)

    @contextlib.contextmanager
    def _around(self) -> Iterator[None]:
        """Random states are left as they were; what torch refuses is said in one sentence."""
        before = random.getstate(), torch.get_rng_state()
        card = absent_card(self.model, self.device)
        try:
            with CudaOperators(card) if card is not None else contextlib.nullcontext():
                yield
        except (PlannerError, CaptureError):
            raise
        except RuntimeError as error:
            raise RewriteError(
                "a block does not do the same when it runs again, so PyTorch's checkpointing cannot wrap it. A cache "
                f"that the block fills is the usual cause (config.use_cache = False). torch: {_first_line(error)}"
            ) from error
        finally:
            random.setstate(before[0])
            torch.set_rng_state(before[1])


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
