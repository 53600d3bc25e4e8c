"""What a watch found: each step's peak against its prediction, and the operator at which the two part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graph_capture.formats import format_bytes
from planner.out_of_memory import Expectation
from solvers.schedule import programs_of
from solvers.simulator import Regime, timeline_of

BETWEEN = "the caller's code between forward and backward"


@dataclass(frozen=True)
class Execution:
    """One execution of the schedule.

    **Fields:**

    - `operator`: name in the plan's graph. `target`: what it calls. `module`, `source`: where it comes from.
    - `program`: `"forward"`, `"loss"` (what the caller runs between the programs, all of it) or `"backward"`.
    - `again`: whether the operator has run before in the same step.
    - `predicted_bytes`: alive while it runs, everything that the budget covers included.
    """

    operator: str
    target: str
    module: str
    source: str
    program: str
    again: bool
    predicted_bytes: int

    def __str__(self) -> str:
        if self.program == "loss":
            return BETWEEN
        origin = ", ".join(part for part in (self.module, self.source) if part)
        again = ", recomputed" if self.again else ""
        return f"{self.target}{f' ({origin})' if origin else ''} in the {self.program}{again}"


def executions_of(expectation: Expectation, regime: Regime) -> tuple[Execution, ...]:
    """The executions of a schedule as the programs run them: the caller's loss is one, whatever is in it."""
    graph, order = expectation.graph, expectation.schedule.order
    timeline = timeline_of(graph, expectation.schedule, regime)
    rows: list[Execution] = []
    done: set[int] = set()
    for index, program, size in zip(order, programs_of(graph, order), timeline, strict=True):
        o = graph.operators[index]
        if program == "loss" and rows and rows[-1].program == "loss":
            size = max(size, rows.pop().predicted_bytes)
        rows.append(Execution(o.name, o.target, o.module, o.source, program, index in done, size))
        done.add(index)
    return tuple(rows)


@dataclass(frozen=True)
class Parting:
    """An execution at which actual and predicted bytes differ; `position` is its place among those of the step."""

    execution: Execution
    position: int
    actual_bytes: int

    def __str__(self) -> str:
        predicted = self.execution.predicted_bytes
        difference = self.actual_bytes - predicted
        return (
            f"{self.execution}: predicted {format_bytes(predicted)}, actual {format_bytes(self.actual_bytes)}, "
            f"{format_bytes(abs(difference))} {'more' if difference > 0 else 'less'}"
        )


@dataclass(frozen=True)
class WatchedStep:
    """One step: a call of a planned model and its backward.

    **Fields:**

    - `executions`, `actual_bytes`: what was predicted, and what was in memory at most during each execution and until
      the next one; `None` where it did not run while the watch was on.
    - `regime`: `"later"` if `.grad` was there when the step began, else `"first"`.
    - `tolerance_bytes`: what may differ at an execution before it counts as parted.
    - `beside_bytes`: what was there at the start of the step and not at the start of the first one that was watched
      (`.grad` left aside): an optimizer's state, a kept output, a leak. It is not in `actual_bytes`.
    - `covered`: whether the plan was made for this regime.
    """

    executions: tuple[Execution, ...]
    actual_bytes: tuple[int | None, ...]
    regime: Regime
    budget_bytes: int
    tolerance_bytes: int
    beside_bytes: int = 0
    covered: bool = True

    @property
    def predicted_peak_bytes(self) -> int:
        """The most that was predicted in this regime."""
        return max((e.predicted_bytes for e in self.executions), default=0)

    @property
    def actual_peak_bytes(self) -> int:
        """The most that was in memory while the step was watched; 0 if nothing of it ran."""
        return max((size for size in self.actual_bytes if size is not None), default=0)

    @property
    def complete(self) -> bool:
        """Whether the whole step, its backward included, was watched."""
        return all(size is not None for size in self.actual_bytes)

    @property
    def over(self) -> Parting | None:
        """The first execution that needed more than predicted, by more than the tolerance."""
        return self._first(lambda actual, predicted: actual > predicted + self.tolerance_bytes)

    @property
    def under(self) -> Parting | None:
        """The first execution that needed less than predicted, by more than the tolerance."""
        return self._first(lambda actual, predicted: actual < predicted - self.tolerance_bytes)

    @property
    def over_budget(self) -> Parting | None:
        """The first execution at which the budget was exceeded; no tolerance."""
        return self._first(lambda actual, _: actual > self.budget_bytes)

    @property
    def holds(self) -> bool:
        """Whether the peak is within the budget, and not above the prediction by more than the tolerance."""
        above = self.actual_peak_bytes - self.predicted_peak_bytes
        return self.over_budget is None and above <= self.tolerance_bytes

    def _first(self, parts: Callable[[int, int], bool]) -> Parting | None:
        for position, (execution, actual) in enumerate(zip(self.executions, self.actual_bytes, strict=True)):
            if actual is not None and parts(actual, execution.predicted_bytes):
                return Parting(execution, position, actual)
        return None

    def __str__(self) -> str:
        micro = f"{self.regime} micro-batch" + ("" if self.complete else ", not watched to its end")
        lines = [
            f"{'ok' if self.holds else 'OVER'} ({micro}): predicted peak {format_bytes(self.predicted_peak_bytes)}, "
            f"actual {format_bytes(self.actual_peak_bytes)}, budget {format_bytes(self.budget_bytes)}"
        ]
        if self.over is not None:
            lines.append(f"more than predicted first at {self.over}")
        if self.over_budget is not None and (self.over is None or self.over.position != self.over_budget.position):
            lines.append(f"over the budget first at {self.over_budget}")
        if self.under is not None:
            lines.append(f"less than predicted first at {self.under}")
        if self.over is None and self.under is None:
            lines.append(f"within {format_bytes(self.tolerance_bytes)} of the prediction at every operator")
        if not self.covered:
            lines.append(
                "the plan was made with gradient_accumulation=False, and .grad was there: call "
                "zero_grad(set_to_none=True) before the step, or plan for accumulation"
            )
        if self.beside_bytes:
            lines.append(
                f"{format_bytes(abs(self.beside_bytes))} {'more' if self.beside_bytes > 0 else 'less'} beside the step "
                "than when the first one began (an optimizer's state, a kept output), not counted above"
            )
        return "\n    ".join(lines)


class WatchReport:
    """What :func:`planner.watch` found; `steps` is filled when the watch ends."""

    def __init__(self) -> None:
        self.steps: Sequence[WatchedStep] = ()

    @property
    def holds(self) -> bool:
        """Whether every step did."""
        return all(step.holds for step in self.steps)

    def __str__(self) -> str:
        if not self.steps:
            return "no step has been watched to its end yet: the report is there when the watch is left"
        return "\n".join(f"step {number}: {step}" for number, step in enumerate(self.steps, start=1))
