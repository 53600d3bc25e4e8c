"""What a solver returns, and the contract that every solver keeps."""

from __future__ import annotations

import abc
import dataclasses
import enum
import math
from dataclasses import dataclass, field
from typing import ClassVar

from graph_capture.graph import Graph
from solvers.hints import NO_HINTS, Hints
from solvers.schedule import Schedule
from solvers.simulator import simulate


class Status(enum.Enum):
    """How a solver ended; the value is the text that a user reads."""

    OPTIMAL = "optimal: no schedule of the class that the solver searches has less overhead"
    FEASIBLE = "feasible: the schedule fits; its distance from the optimum is at most the gap"
    INFEASIBLE = "infeasible: proven, no schedule of the class that the solver searches fits the budget"
    UNKNOWN = "nothing found within the limits: allow more time, raise the budget or try another solver"
    NOT_APPLICABLE = "the solver does not apply to this graph"


class SearchClass(enum.Enum):
    """The class of schedules that a solver searches; optima are comparable only within a class."""

    STORE_ALL = "store-all: every operator once"
    ORDERED = "ordered: first executions in captured order, any recomputation anywhere"
    STAGED = "staged: ordered, and each operator at most once per stage, in order inside of it"
    INTERVALS = "C intervals: staged, and each value in memory over at most C intervals"
    PERSISTENT_CHAIN = "persistent chain: a checkpointed value stays until its segment's backward"
    FREE = "free: first executions in any legal order, any recomputation anywhere"
    MIXED = "the union of the classes of the solvers that took part"


@dataclass(frozen=True)
class Solution:
    """Outcome of one solve.

    **Fields:**

    - `schedule`: the best schedule found, verified by the simulator; `None` if there is none.
    - `overhead`: seconds of recomputation / seconds of the store-all step; `inf` without a schedule.
    - `lower_bound`: no schedule described by `bound_scope` has less overhead within the budget; `inf` if infeasible.
      It never comes from a restriction.
    - `predicted_peak_bytes`: the simulator's peak of `schedule`; 0 without one.
    - `seconds`: time that the solver took. `hit_limit`: whether a time or work limit stopped it.
    - `message`: what the user should know: why nothing was found, what to do.
    - `smallest_known_budget_bytes`: the smallest peak of any schedule that was met; `None` if none was.
    - `floor_operator`: the operator that sets the smallest budget that could ever work, for infeasible budgets.
    - `interrupted`: whether Ctrl-C ended the solve.
    - `schedule_by`, `bound_by`: which method gave the schedule and which the bound; empty where it is the solver.
    - `trace`: one line per event of the solve, for those who want to look inside.
    """

    solver: str
    status: Status
    schedule: Schedule | None
    overhead: float
    lower_bound: float
    predicted_peak_bytes: int
    search_class: SearchClass
    bound_scope: str
    seconds: float
    hit_limit: bool = False
    message: str = ""
    smallest_known_budget_bytes: int | None = None
    floor_operator: int | None = None
    interrupted: bool = False
    schedule_by: str = ""
    bound_by: str = ""
    trace: tuple[str, ...] = field(default=())

    @property
    def gap(self) -> float:
        """Overhead minus lower bound, as a fraction of the store-all step; `inf` without a schedule."""
        return math.inf if self.schedule is None else max(0.0, self.overhead - self.lower_bound)


class Solver(abc.ABC):
    """A frozen object that carries its own options and turns a graph and a budget into a :class:`Solution`.

    A solver never raises because a budget cannot be met: it says so in the solution. It returns only schedules that
    the simulator accepts within the budget, and a lower bound only if it holds for every schedule of `bound_scope`.
    """

    name: ClassVar[str] = ""

    @abc.abstractmethod
    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """Find a schedule of `graph` whose simulated peak is at most `budget_bytes`; `hints` may be ignored."""

    def applies_to(self, graph: Graph) -> str | None:
        """`None` if the solver applies to `graph`, else the reason why it does not."""
        return None


def with_time_limit(solver: Solver, seconds: float) -> Solver:
    """The same solver with another time limit; unchanged if it has none."""
    if dataclasses.is_dataclass(solver) and any(f.name == "time_limit_seconds" for f in dataclasses.fields(solver)):
        return dataclasses.replace(solver, time_limit_seconds=float(seconds))  # type: ignore[type-var,return-value]
    return solver


def overhead_of(graph: Graph, schedule: Schedule) -> tuple[float, int]:
    """Overhead (a fraction of the store-all step) and peak bytes of a legal schedule."""
    simulation = simulate(graph, schedule)
    step_seconds = graph.step_seconds
    return (simulation.recomputed_seconds / step_seconds if step_seconds else 0.0), simulation.peak_bytes


def memory_floor(graph: Graph) -> tuple[int, int]:
    """Bytes below which no schedule of any order works, and the operator that needs them.

    An operator needs its inputs, its outputs (less what it may take over in place), its workspace, and everything
    resident at once. This is the order-free bound: the maximum over all operators.
    """
    sizes = [value.size_bytes for value in graph.values]
    floor, at = graph.resident_total_bytes, 0
    for index, operator in enumerate(graph.operators):
        need = sum(sizes[v] for v in operator.inputs) + sum(sizes[v] for v in operator.outputs)
        need -= max((sizes[v] for _, v in operator.in_place), default=0)
        need += graph.resident_total_bytes + operator.workspace_bytes
        if need > floor:
            floor, at = need, index
    return floor, at
