"""``max_batch_size(model, budget, make_inputs)``: the largest batch whose training step fits, with its plan.

Every batch that is tried is captured anew on fake tensors, which allocate nothing: no scaling from one batch to another
is trusted, because shapes change kernels, workspace and even the graph. The search doubles the batch until one does not
fit, then bisects.

What is promised: the batch that comes back fits, with a verified plan; and the next larger one (one `multiple_of` more)
was tried, too, and did not, unless the limit was reached. Whether that is *proven* or only *not found* is said. Memory
is not always monotone in the batch (workspace and allocator rounding are not), so a still larger batch could fit
although a smaller one does not; nobody looks for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from graph_capture.capture import Capture
from graph_capture.costs import Costs
from graph_capture.devices import Device
from graph_capture.errors import CaptureError
from graph_capture.fake import fake_mode_of
from graph_capture.graph import Compiler
from planner.api import LossFn, capture_with_peak, plan_of
from planner.batch_table import batch_text
from planner.budget import Budget, parse_budget
from planner.errors import BudgetError, NoScheduleError, error_for_solution
from planner.pins import Patterns, Pins, pins_of
from planner.plan_file import Plan
from solvers.auto import chosen_solver
from solvers.hints import Hints, Progress, ProgressListener
from solvers.schedule import Schedule
from solvers.simulator import ScheduleError, simulate, simulate_store_all
from solvers.solution import Solution, Solver, Status

MakeInputs = Callable[[int], Any]
Outcome = Literal["fits", "impossible", "not found", "too slow"]
Preference = Literal["largest", "fastest"]

LIMIT = 1 << 16
SECONDS_PER_BATCH = 10.0


@dataclass(frozen=True)
class BatchTrial:
    """One batch that was tried.

    **Fields:**

    - `outcome`: `"fits"`; `"impossible"`: proven, no schedule of the solver's scope fits (or is fast enough); `"not
      found"`: the solver found none, and no proof; `"too slow"`: what it found costs more than `max_overhead`.
    - `overhead`: of the schedule that was found, a fraction of the store-all step; `None` without one.
    - `peak_bytes`: of that schedule. `store_all_peak_bytes`: without recomputation.
    - `samples_per_second`: by the cost model, recomputation included; `None` where nothing was found.
    - `seconds`: that capture and solve took.
    """

    batch: int
    outcome: Outcome
    overhead: float | None
    peak_bytes: int | None
    store_all_peak_bytes: int
    samples_per_second: float | None
    seconds: float
    message: str = ""

    @property
    def fits(self) -> bool:
        """Whether the batch fits."""
        return self.outcome == "fits"


@dataclass(frozen=True)
class MaxBatchSize:
    """The largest batch that was found, its plan, and what was tried.

    **Fields:**

    - `batch`, `plan`: the answer; the plan was made for inputs of that batch.
    - `store_all_batch`: the largest batch that fits without recomputation, found in the same way; 0 if none does.
    - `trials`: in ascending order of the batch. `budget_bytes`: what had to hold.
    - `proven`: whether the next larger batch is proven not to fit. `limit_reached`: whether there was none to try.
    - `interrupted`: whether Ctrl-C ended the search; then this is the best batch by then, and the next one is open.
    """

    batch: int
    plan: Plan
    store_all_batch: int
    trials: tuple[BatchTrial, ...]
    budget_bytes: int
    proven: bool
    limit_reached: bool
    interrupted: bool = False

    def __str__(self) -> str:
        return batch_text(self)

    @property
    def fastest(self) -> BatchTrial:
        """The trial with the most samples per second by the cost model, of those that fit."""
        return max((t for t in self.trials if t.fits), key=lambda t: t.samples_per_second or 0.0)

    @property
    def trial(self) -> BatchTrial:
        """The trial of the answer."""
        return next(t for t in self.trials if t.batch == self.batch)


def max_batch_size(
    model: Any,
    budget: int | str | Budget,
    make_inputs: MakeInputs,
    *,
    loss_fn: LossFn | None = None,
    solver: Solver | None = None,
    device: str | Device | None = None,
    time_limit_seconds: float = SECONDS_PER_BATCH,
    gradient_accumulation: bool = True,
    extra_bytes: Mapping[str, int] | None = None,
    costs: Costs = "roofline",
    compiler: Compiler = "eager",
    keep: Patterns = (),
    recompute: Patterns = (),
    max_overhead: float | None = None,
    multiple_of: int = 1,
    limit: int = LIMIT,
    prefer: Preference = "largest",
    progress: ProgressListener | None = None,
) -> MaxBatchSize:
    """The largest batch whose training step fits within `budget`, by recomputing what it must.

    **Arguments:** as :func:`planner.plan`, but

    - `budget`: in bytes; a percentage would be of another peak for every batch, and is refused.
    - `make_inputs`: takes a batch size and returns what the model is called with: `args` (a tuple), `(args, kwargs)`, a
      dict of keyword arguments, or the one argument. It is called on fake tensors, which allocate nothing; if it fails
      there (it reads data, or numbers out of a tensor), it is called once more for real.
    - `time_limit_seconds`: for the solver, at each batch.
    - `max_overhead`: the largest overhead that is worth it, as a fraction of the step; 0.2 is 20 %.
    - `multiple_of`: only multiples of it are tried. `limit`: no larger batch is.
    - `prefer`: `"largest"`, or `"fastest"`: the most samples per second by the cost model, of the batches tried.

    **Returns:** a :class:`MaxBatchSize`; the module docstring says what it promises.

    Raises :class:`~planner.errors.BudgetError`, :class:`~planner.errors.CaptureError` with the batch at which it
    happened, and :class:`~planner.errors.InfeasibleBudgetError` or :class:`~planner.errors.NoScheduleError` if not even
    the smallest batch fits.

    ```python
    found = max_batch_size(model, "12GiB", lambda batch: (torch.zeros(batch, 1024, dtype=torch.long),))
    model = rewrite(model, found.plan)  # and train with found.batch
    ```
    """
    wanted = _in_bytes(budget)
    _check_numbers(max_overhead, multiple_of, limit, prefer)
    options = {
        "loss_fn": loss_fn,
        "device": device,
        "gradient_accumulation": gradient_accumulation,
        "extra_bytes": extra_bytes,
        "costs": costs,
        "compiler": compiler,
    }
    solver = chosen_solver(solver, time_limit_seconds)
    pins, began = pins_of(keep, recompute), time.monotonic()
    question = _Question(model, make_inputs, wanted, solver, options, pins, max_overhead, progress, began)
    search = _Search(question, multiple_of, limit // multiple_of, prefer)
    return search.run()


def call_of(made: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `make_inputs` returned, as positional and keyword arguments."""
    if isinstance(made, Mapping):
        return (), dict(cast(Mapping[str, Any], made))
    if not isinstance(made, (tuple, list)):
        return (made,), {}
    parts = cast(Sequence[Any], made)
    if len(parts) == 2 and isinstance(parts[0], (tuple, list)) and isinstance(parts[1], Mapping):
        return tuple(cast(Sequence[Any], parts[0])), dict(cast(Mapping[str, Any], parts[1]))
    return tuple(parts), {}


def _in_bytes(budget: int | str | Budget) -> Budget:
    wanted = parse_budget(budget)
    if wanted.size_bytes is None:
        raise BudgetError(
            f"budget {wanted.requested!r} is a percentage of eager's peak, which grows with the batch: give bytes"
        )
    return wanted


def _check_numbers(max_overhead: float | None, multiple_of: int, limit: int, prefer: str) -> None:
    if max_overhead is not None and not max_overhead >= 0:
        raise ValueError(f"max_overhead is {max_overhead}; give a fraction of the step, such as 0.2 for 20 %")
    if multiple_of < 1 or limit < multiple_of:
        raise ValueError(f"multiple_of is {multiple_of}, limit {limit}; it must be 1 <= multiple_of <= limit")
    if prefer not in ("largest", "fastest"):
        raise ValueError(f"prefer must be 'largest' or 'fastest', not {prefer!r}")


@dataclass(frozen=True)
class _Captured:
    """The captured step of one batch."""

    batch: int
    module: torch.nn.Module
    capture: Capture
    capture_seconds: float
    store_all_peak_bytes: int


@dataclass(frozen=True)
class _Answer:
    """One trial with what a plan is made of."""

    trial: BatchTrial
    captured: _Captured
    solution: Solution


@dataclass(frozen=True)
class _Question:
    """What is asked of every batch."""

    model: Any
    make_inputs: MakeInputs
    wanted: Budget
    solver: Solver
    options: dict[str, Any]
    pins: Pins
    max_overhead: float | None
    progress: ProgressListener | None
    began: float

    def tell(self, batch: int, event: Progress) -> None:
        """Tell the listener of an event, with the batch that it is of; nobody knows how many batches are to come."""
        if self.progress is not None:
            seconds, stage = time.monotonic() - self.began, f"batch {batch}, {event.stage}"
            self.progress(dataclasses.replace(event, stage=stage, seconds=seconds, time_limit_seconds=None))

    @property
    def budget_bytes(self) -> int:
        assert self.wanted.size_bytes is not None
        return self.wanted.size_bytes

    def capture(self, batch: int, best: _Answer | None = None) -> _Captured:
        """Capture the step of a batch; raises `CaptureError` with the batch in its message. `best`: what is known."""
        started = time.perf_counter()
        stage = "capturing" if best is None else f"capturing; {best.trial.batch} fits"
        overhead, bound = (math.inf, 0.0) if best is None else (best.solution.overhead, best.solution.lower_bound)
        self.tell(batch, Progress("max batch", stage, 0.0, None, overhead, bound))
        args, kwargs = self._inputs(batch)
        try:
            module, captured, _ = capture_with_peak(self.model, args, kwargs, pins=self.pins, **self.options)
        except CaptureError as error:
            raise type(error)(f"batch {batch}: {error}") from error
        seconds = time.perf_counter() - started
        return _Captured(batch, module, captured, seconds, simulate_store_all(captured.graph).peak_bytes)

    def _inputs(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        held = self.model if isinstance(self.model, torch.nn.Module) else torch.nn.Module()
        with torch.random.fork_rng(devices=[]):
            try:
                with fake_mode_of(held, ()):
                    return call_of(self.make_inputs(batch))
            except Exception:  # the user's code, on tensors without data: what is wrong with it, it says on real ones
                return call_of(self.make_inputs(batch))

    def answer(self, captured: _Captured, known: Sequence[int] | None) -> _Answer:
        """Solve for a batch; `known` is the order of another batch's schedule, tried where it is legal."""
        began = time.perf_counter()
        graph = captured.capture.graph
        solution = self.solver.solve(graph, self.budget_bytes, self._hints(captured, known))
        too_slow = self.max_overhead is not None and solution.overhead > self.max_overhead
        outcome: Outcome = "fits"
        if solution.schedule is None:
            outcome = "impossible" if solution.status is Status.INFEASIBLE else "not found"
        elif too_slow:
            proven = self.max_overhead is not None and solution.lower_bound > self.max_overhead
            outcome = "impossible" if proven else "too slow"
        found = solution.schedule is not None
        step_seconds = graph.step_seconds * (1.0 + solution.overhead) if found else 0.0
        trial = BatchTrial(
            batch=captured.batch,
            outcome=outcome,
            overhead=solution.overhead if found else None,
            peak_bytes=solution.predicted_peak_bytes if found else None,
            store_all_peak_bytes=captured.store_all_peak_bytes,
            samples_per_second=captured.batch / step_seconds if step_seconds else None,
            seconds=captured.capture_seconds + time.perf_counter() - began,
            message=solution.message,
        )
        return _Answer(trial, captured, solution)

    def _hints(self, captured: _Captured, known: Sequence[int] | None) -> Hints:
        graph = captured.capture.graph
        hints = Hints(progress=functools.partial(self.tell, captured.batch))
        if known is None or max(known, default=-1) >= len(graph):
            return hints
        schedule = Schedule.from_order(graph, known)
        try:
            simulate(graph, schedule)
        except ScheduleError:  # another graph than the one that it was made for: then it is no hint
            return hints
        return dataclasses.replace(hints, schedules=(schedule,))


class _Search:
    """Doubling, then bisection; batches are counted in units of `multiple_of`."""

    def __init__(self, question: _Question, unit: int, most: int, prefer: Preference) -> None:
        self.question, self.unit, self.most, self.prefer = question, unit, most, prefer
        self.trials: dict[int, BatchTrial] = {}
        self.store_all_peaks: dict[int, int] = {}
        self.chosen: _Answer | None = None
        self.order: Sequence[int] | None = None
        self.interrupted = False

    def run(self) -> MaxBatchSize:
        """Search; raises if the smallest batch does not fit. Ctrl-C ends the search with the best batch by then."""
        high: int | None = None
        try:
            high = self._narrowed()
        except KeyboardInterrupt:
            if self.chosen is None:
                raise
            self.interrupted = True
        assert self.chosen is not None
        question, answer = self.question, self.chosen
        plan = plan_of(
            answer.captured.module,
            answer.captured.capture,
            question.wanted,
            question.budget_bytes,
            answer.solution,
            question.solver,
            answer.captured.capture_seconds,
            question.options["costs"],
            question.pins,
        )
        beyond = None if high is None else self.trials[high]
        return MaxBatchSize(
            batch=answer.trial.batch,
            plan=plan,
            store_all_batch=self._store_all(),
            trials=tuple(self.trials[units] for units in sorted(self.trials)),
            budget_bytes=question.budget_bytes,
            proven=beyond is not None and beyond.outcome == "impossible",
            limit_reached=high is None and not self.interrupted,
            interrupted=self.interrupted,
        )

    def _narrowed(self) -> int | None:
        """The smallest batch that did not fit, right above the largest that did; `None` if the limit was reached."""
        low, high = self._doubled()
        while high is not None and high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return high

    def _doubled(self) -> tuple[int, int | None]:
        """The last batch that fitted, and the first one that did not; `None` if the limit was reached."""
        units = 1
        while self.fits(units):
            if units == self.most:
                return units, None
            units = min(2 * units, self.most)
        if units == 1:
            raise AssertionError("unreachable: the smallest batch raises where it does not fit")
        return max(u for u in self.trials if self.trials[u].fits), units

    def fits(self, units: int) -> bool:
        """Try one batch; remember the best one."""
        captured = self.question.capture(units * self.unit, self.chosen)
        self.store_all_peaks[units] = captured.store_all_peak_bytes
        answer = self.question.answer(captured, self.order)
        self.trials[units] = answer.trial
        if not answer.trial.fits:
            if units == 1:
                raise self._nothing_fits(answer)
            return False
        assert answer.solution.schedule is not None
        self.order = answer.solution.schedule.order
        if self.chosen is None or self._score(answer.trial) > self._score(self.chosen.trial):
            self.chosen = answer
        if answer.solution.interrupted:
            raise KeyboardInterrupt  # the solver took it as the end of its own search: it is the end of this one, too
        return True

    def _score(self, trial: BatchTrial) -> float:
        return trial.batch if self.prefer == "largest" else trial.samples_per_second or 0.0

    def _store_all(self) -> int:
        """The largest batch that fits without recomputation; needs captures only."""
        budget_bytes = self.question.budget_bytes
        low = max((u for u, peak in self.store_all_peaks.items() if peak <= budget_bytes), default=0)
        high = min((u for u, peak in self.store_all_peaks.items() if u > low), default=None)
        while high is not None and high - low > 1 and not self.interrupted:
            middle = (low + high) // 2
            peak = self.question.capture(middle * self.unit).store_all_peak_bytes
            low, high = (middle, high) if peak <= budget_bytes else (low, middle)
        return low * self.unit

    def _nothing_fits(self, answer: _Answer) -> NoScheduleError:
        captured, question = answer.captured.capture, self.question
        if answer.solution.schedule is None:
            eager = captured.eager_peak_bytes or 0
            return error_for_solution(answer.solution, captured.graph, question.budget_bytes, eager)
        return NoScheduleError(
            f"batch {self.unit}, the smallest, fits with an overhead of {answer.solution.overhead:.2%} at the least "
            f"that was found, max_overhead is {question.max_overhead:.2%}: raise one of them or the budget",
            solution=answer.solution,
        )
