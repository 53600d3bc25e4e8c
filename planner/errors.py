"""Errors of the planner: what a user may want to catch, and what a message must say.

    PlannerError (Exception)
    ├── BudgetError (ValueError)       a budget that cannot be read
    ├── NoScheduleError                no schedule was found; carries the solver's Solution
    │   └── InfeasibleBudgetError      ... and it is proven that there is none
    ├── PinError (ValueError)          keep= or recompute= name a module that is not there, or contradict each other
    ├── InvalidPlanError               a plan that contradicts itself, as one over its own budget
    │   └── PlanFileError              ... read from a file, or a file that is no plan at all
    ├── PlanMismatchError              a plan that was made for another model, other inputs or another mode
    ├── RewriteError                   a model that cannot be rewritten, or a call that a rewritten model refuses
    ├── CertificateError (ValueError)  a certificate that does not prove what it says, or is no certificate at all
    ├── LoopError (ValueError)         a loop that cannot be checkpointed, or is used in a way that it must refuse
    ├── WatchError                     a watch that could see nothing, or a step that needed more than predicted
    ├── UnsupportedModelError          a model that there is nothing to plan for
    └── FactoryError                   FILE:FACTORY on the command line cannot be loaded or called

    CaptureError (RuntimeError)        from :mod:`graph_capture.errors`: a model that cannot be captured
    └── InputsUnknownError             nobody said which inputs the model is called with

Every message says what was wrong, with which value, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graph_capture.errors import CaptureError, InputsUnknownError

if TYPE_CHECKING:
    from graph_capture.graph import Graph
    from solvers.solution import Solution

__all__ = [
    "BudgetError",
    "CaptureError",
    "CertificateError",
    "FactoryError",
    "InfeasibleBudgetError",
    "InputsUnknownError",
    "InvalidPlanError",
    "LoopError",
    "NoScheduleError",
    "PinError",
    "PlanFileError",
    "PlanMismatchError",
    "PlannerError",
    "RewriteError",
    "UnsupportedModelError",
    "WatchError",
    "error_for_solution",
]


class PlannerError(Exception):
    """Base of everything that the planner raises on purpose."""


class BudgetError(PlannerError, ValueError):
    """A budget cannot be read; the message says what to write instead."""


class PinError(PlannerError, ValueError):
    """`keep` or `recompute` name no module, or contradict each other; the message lists the names that are near."""


class NoScheduleError(PlannerError):
    """No schedule was found.

    **Fields:**

    - `solution`: what the solver returned, its bound and its trace included; `None` where no solver ran.
    - `smallest_known_budget_bytes`: the smallest budget that is known to work; `None` if none is.
    - `floor_operator`: name of the operator that sets the smallest budget that could ever work; `None` if unknown.
    """

    # Defaults, because unpickling calls the class with the message alone and restores the attributes after it.
    def __init__(
        self,
        message: str,
        *,
        solution: Solution | None = None,
        smallest_known_budget_bytes: int | None = None,
        floor_operator: str | None = None,
    ) -> None:
        super().__init__(message)
        self.solution = solution
        self.smallest_known_budget_bytes = smallest_known_budget_bytes
        self.floor_operator = floor_operator


class InfeasibleBudgetError(NoScheduleError):
    """It is proven that no schedule of the solver's scope fits the budget; the message has the proof."""


class InvalidPlanError(PlannerError):
    """A plan contradicts itself: its schedule is not legal, is over the budget, or costs something else than stated."""


class PlanFileError(InvalidPlanError):
    """A plan file cannot be used: not JSON, truncated, of another schema version, or changed after it was written."""


class PlanMismatchError(PlannerError):
    """A plan was made for another model, other inputs or another mode; the message spells the difference out."""


class RewriteError(PlannerError, RuntimeError):
    """A model cannot be rewritten, or a rewritten model is called in a way that it must refuse."""


class CertificateError(PlannerError, ValueError):
    """A certificate does not prove what it says; the message names the claim, and what was found instead."""


class LoopError(PlannerError, ValueError):
    """A loop cannot be checkpointed, or is differentiated in a way that it must refuse."""


class WatchError(PlannerError):
    """A watch could see nothing, or saw a step that needed more memory than predicted; the message has the operator."""


class UnsupportedModelError(PlannerError):
    """There is nothing to plan for a model, as when no parameter needs a gradient."""


class FactoryError(PlannerError):
    """`FILE:FACTORY` names nothing that can be loaded, or what it names does not return a model and its inputs."""


def error_for_solution(
    solution: Solution, graph: Graph, budget_bytes: int, eager_peak_bytes: int = 0
) -> NoScheduleError:
    """The error for a solution without a schedule: the proof, the smallest budget known to work, and the floor.

    **Arguments:**

    - `eager_peak_bytes`: if it is known, the smallest budget is given as a percentage of it, too.
    """
    from graph_capture.formats import format_bytes
    from planner.pins import is_pinned
    from solvers.solution import Status, memory_floor

    infeasible = solution.status is Status.INFEASIBLE
    lines = [f"no schedule fits the budget of {format_bytes(budget_bytes)}"]
    lines.append(
        f"{'proof' if infeasible else 'outcome'} ({solution.solver}): {solution.message or solution.status.value}"
    )
    if infeasible and solution.bound_scope:
        lines.append(f"the proof covers: {solution.bound_scope}")
    smallest = solution.smallest_known_budget_bytes
    if smallest is not None:
        share = f", {100 * smallest / eager_peak_bytes:.1f} % of eager's peak" if eager_peak_bytes > 0 else ""
        lines.append(f"the smallest budget known to work: {format_bytes(smallest)}{share}")
    floor_bytes, at = memory_floor(graph)
    if solution.floor_operator is not None:
        at = solution.floor_operator
    name = graph.operators[at].name if graph.operators else None
    if name is not None:
        place = graph.operators[at].module or graph.operators[at].source
        lines.append(
            f"the floor is set by operator {name}{f' of {place}' if place else ''}: {format_bytes(floor_bytes)}"
        )
    if is_pinned(graph):
        lines.append("the modules pinned by keep= and recompute= count: without them less may do")
    advice = "raise the budget" if infeasible else "raise the budget, allow more time or try another solver"
    lines.append(f"{advice}, or make the step smaller (batch size, sequence length, dtype)")
    kind = InfeasibleBudgetError if infeasible else NoScheduleError
    return kind("; ".join(lines), solution=solution, smallest_known_budget_bytes=smallest, floor_operator=name)
