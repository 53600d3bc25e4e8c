"""``watch(model)``: each step's memory against its prediction, operator by operator.

    with planner.watch(model) as report:
        model(ids, labels=ids).loss.backward()
    print(report)

The planned programs run with a mark before each execution of the schedule, and the allocator is asked for the most
bytes between two marks. What is compared is the memory of the step itself: it begins at what the plan counts as
resident (and `.grad`), whatever else is on the device. What an earlier step returned and the caller still holds is
beside the step, also when it goes while the step runs.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from graph_capture.allocator import AllocatorTrace, CudaTrace, Window
from graph_capture.eager import rounded_up
from planner.errors import WatchError
from planner.marks import Listener, listen
from planner.planned_call import planned_call
from planner.watch_report import WatchedStep, WatchReport, executions_of

if TYPE_CHECKING:
    from planner.backend import PlannedBackend
    from planner.out_of_memory import Expectation
    from solvers.simulator import Regime

OnPart = Literal["report", "warn", "raise"] | Callable[[WatchedStep], Any]
CUDA_UNIT_BYTES = 512


@contextlib.contextmanager
def watch(
    model: nn.Module | None = None, *, tolerance: float = 0.01, on_part: OnPart = "report"
) -> Iterator[WatchReport]:
    """Watch the training steps of a planned model inside of a `with` block; the report is filled at its end.

    **Arguments:**

    - `model`: the planned model, or one that contains it. Without it every planned program is watched, those of
      `torch.compile(..., backend="checkpoint_planner")` included.
    - `tolerance`: what actual and predicted bytes may differ at an operator, as a fraction of the predicted peak; a few
      bytes of bookkeeping beside it.
    - `on_part`: what happens at the end with a step whose peak is above the prediction by more than the tolerance, or
      over the budget: nothing (`"report"`), a warning, a :class:`WatchError`, or a function of the
      :class:`~planner.watch_report.WatchedStep` that is called.

    Gradients and results are those of the step without a watch; it takes longer (on the CPU torch's profiler runs). An
    operator's bytes are the most from its start to the next one's start, so that what autograd copies after it belongs
    to it. Let go of what earlier steps returned before the watch: what goes during the first step is taken for the
    step's own. On CUDA the library workspaces that PyTorch keeps are counted where they are first allocated.

    Raises :class:`WatchError` where nothing could be seen: no plan, a plan compiled with Inductor, whose kernels are no
    operators, a model that is planned block by block, another profiler at work, or no training step inside the block.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is a fraction of the predicted peak, at least 0 and below 1, not {tolerance!r}")
    if not callable(on_part) and on_part not in ("report", "warn", "raise"):
        raise ValueError(f"on_part must be 'report', 'warn', 'raise' or a function, not {on_part!r}")
    global _active
    if _active is not None:
        raise WatchError("a watch is on already, and there can be one at a time: leave it before the next one")
    if model is not None:
        _check_watchable(model)
    report = WatchReport()
    _active = watching = _Watch(model)
    try:
        yield report
    finally:
        _active = None
        listen(None)
        report.steps = watching.close(tolerance)
    if not report.steps:
        raise WatchError(
            "no step of a planned model ran inside of the watch: call the model in it, with gradients enabled"
        )
    for number, step in enumerate(report.steps, start=1):
        if not step.holds:
            _tell(number, step, on_part)


def begin_call(
    backend: PlannedBackend, expectation: Expectation | None, arguments: Sequence[Any]
) -> WatchedCall | None:
    """What listens to a planned call that is about to start; `None` if no watch covers it."""
    return None if _active is None else _active.begin(backend, expectation, arguments)


@dataclass
class _Output:
    """A storage that a watched call returned; `died` is the first window in which it was not there any more."""

    reference: weakref.ref[Any]
    size_bytes: int
    died: int | None = None


class WatchedCall(Listener):
    """One call under a watch: which window of the allocator's trace belongs to which execution."""

    def __init__(self, watching: _Watch, expectation: Expectation, gradient_bytes: int) -> None:
        self.expectation, self.gradient_bytes = expectation, gradient_bytes
        self.regime: Regime = "later" if gradient_bytes else "first"
        self.windows: dict[int, int] = {}
        self.outputs: list[_Output] = []
        self.between: int | None = None
        self._backward_seen = False
        self._watching = watching
        self.start = watching.mark()

    def runs(self, execution: int) -> None:
        """Start the window of an execution."""
        self.windows.setdefault(execution, self._watching.mark())

    def forward_ended(self, results: Sequence[Any]) -> None:
        """What follows is the caller's."""
        storages = {s._cdata: s for s in (r.untyped_storage() for r in results if isinstance(r, torch.Tensor))}
        self.outputs = [_Output(weakref.ref(s), s.nbytes()) for s in storages.values()]
        self.between = self._watching.mark()
        listen(None)

    def backward_starts(self) -> None:
        """The first backward of this call is listened to, a second one (`retain_graph`) is not."""
        if _active is not self._watching or self._backward_seen:
            listen(None)
            return
        self._backward_seen = True
        listen(self)
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)  # type: ignore[attr-defined]

    def _backward_ended(self) -> None:
        if _active is self._watching:
            self._watching.mark()
            listen(None)


class _Watch:
    """A watch that is on."""

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.calls: list[WatchedCall] = []
        self._trace: AllocatorTrace | CudaTrace | None = None
        self._unit_bytes = 1

    def mark(self) -> int:
        """Start a window of the trace."""
        assert self._trace is not None
        number = self._trace.mark()
        for output in (o for call in self.calls for o in call.outputs):
            if output.died is None and output.reference() is None:
                output.died = number
        return number

    def begin(
        self, backend: PlannedBackend, expectation: Expectation | None, arguments: Sequence[Any]
    ) -> WatchedCall | None:
        """Listen to a call, if it is the model's."""
        listen(None)
        if self.model is not None and all(b is not backend for b in _backends(self.model)):
            return None
        _refuse_inductor(backend)
        assert expectation is not None, "every planned program has its expectation"
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        gc.collect()  # what is left in cycles would go at an operator that has nothing to do with it
        if self._trace is None:
            self._start(next((t.device for t in tensors if t.device.type == "cuda"), torch.device("cpu")))
        gradients = {id(t): t.grad for t in tensors if t.is_leaf and t.grad is not None}
        there = sum(rounded_up(g.nbytes, self._unit_bytes) for g in gradients.values())
        call = WatchedCall(self, expectation, there)
        self.calls.append(call)
        listen(call)
        return call

    def _start(self, device: torch.device) -> None:
        on_card = device.type == "cuda"
        self._unit_bytes = CUDA_UNIT_BYTES if on_card else 1
        if not on_card and torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            raise WatchError(  # torch would end the other one without a word
                "the CPU's allocations are seen by torch's profiler, and another one is at work: end it before the step"
            )
        self._trace = CudaTrace(device) if on_card else AllocatorTrace()
        self._trace.__enter__()

    def close(self, tolerance: float) -> tuple[WatchedStep, ...]:
        """End the trace; the steps that were seen."""
        if self._trace is None:
            return ()
        self._trace.__exit__(None, None, None)
        return tuple(self._step(call, tolerance) for call in self.calls)

    def _held(self, call: WatchedCall) -> list[_Output]:
        """What earlier calls returned and is still there when a call starts."""
        earlier = self.calls[: self.calls.index(call)]
        return [o for c in earlier for o in c.outputs if o.died is None or o.died > call.start]

    def _step(self, call: WatchedCall, tolerance: float) -> WatchedStep:
        assert self._trace is not None
        windows = self._trace.windows
        held = self._held(call)
        graph = call.expectation.graph
        executions = executions_of(call.expectation, call.regime)
        bookkeeping = graph.resident_bytes.get("bookkeeping", 0)  # counted as resident, and made by the step itself
        above = graph.resident_total_bytes - bookkeeping + call.gradient_bytes - windows[call.start].start_bytes
        actual: list[int | None] = []
        for position, execution in enumerate(executions):
            span = _between(call, position) if execution.program == "loss" else _alone(call, position)
            peaks = [_peak_bytes(windows, number, held) for number in span]
            actual.append(above + max(peaks) if peaks else None)
        first = self.calls[0]
        beside = windows[call.start].start_bytes - call.gradient_bytes
        return WatchedStep(
            executions=executions,
            actual_bytes=tuple(actual),
            regime=call.regime,
            budget_bytes=call.expectation.budget_bytes,
            tolerance_bytes=int(tolerance * max(e.predicted_bytes for e in executions)) + bookkeeping,
            beside_bytes=beside - (windows[first.start].start_bytes - first.gradient_bytes),
            covered=call.regime == "first" or graph.gradient_accumulation,
        )


_active: _Watch | None = None


def _alone(call: WatchedCall, position: int) -> Sequence[int]:
    """The window of one execution; empty if it did not run."""
    return [call.windows[position]] if position in call.windows else []


def _between(call: WatchedCall, position: int) -> Sequence[int]:
    """Those from the end of the forward to the first execution of the backward, other models' calls included."""
    end = min((number for execution, number in call.windows.items() if execution > position), default=None)
    return [] if call.between is None or end is None else range(call.between, end)


def _peak_bytes(windows: Sequence[Window], number: int, held: Sequence[_Output]) -> int:
    """The most in a window, as if what was held at the start of the step had stayed."""

    def gone(until: int) -> int:
        return sum(o.size_bytes for o in held if o.died is not None and o.died <= until)

    peak = windows[number].peak_bytes + gone(number)
    if number + 1 < len(windows):  # something may have gone within the window, before its peak
        peak = max(peak, windows[number + 1].start_bytes + gone(number + 1))
    return peak


def _backends(model: nn.Module) -> Iterator[Any]:
    """What compiles the planned modules of a model; `None` for one that waits for its first step."""
    for module in model.modules():
        call = planned_call(module)
        if call is not None:
            yield getattr(call, "backend", None)


def _check_watchable(model: nn.Module) -> None:
    backends = list(_backends(model))
    name = type(model).__name__
    if not backends:
        raise WatchError(
            f"this {name} has no plan that could be watched: give it one by rewrite() or auto_checkpoint() first. What "
            "torch.compile(..., backend='checkpoint_planner') compiles is watched by watch() without a model"
        )
    if len(backends) > 1:
        raise WatchError(
            f"this {name} has {len(backends)} planned modules. The plan of a block predicts the memory of the block "
            "alone, which cannot be told apart from that of the others: use planner.measure_step(model, ...) for the "
            "peak of the whole step"
        )
    if backends[0] is not None:
        _refuse_inductor(backends[0])


def _refuse_inductor(backend: PlannedBackend) -> None:
    if backend.compiler != "eager":
        raise WatchError(
            "the plan is compiled with Inductor, whose fused kernels are no operators of the plan: watch the model "
            "with a plan for compiler='eager'"
        )


def _tell(number: int, step: WatchedStep, on_part: OnPart) -> None:
    if callable(on_part):
        on_part(step)
    elif on_part == "raise":
        raise WatchError(f"watched step {number}: {step}")
    elif on_part == "warn":
        warnings.warn(f"watched step {number}: {step}", stacklevel=4)
