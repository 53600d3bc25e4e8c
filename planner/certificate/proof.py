"""The search for a proof: instants, memory rows and cuts that raise the bound; part of the maker of certificates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from graph_capture.graph import Graph
from planner.certificate.deadline import Deadline
from planner.certificate.linear import LinearAnswer, LinearProgramError, RelaxedProgram
from planner.certificate.relaxation import Relaxation
from solvers.schedule import Compute, Schedule
from solvers.simulator import Simulation, simulate

TINY_FRACTION = 1e-4
"""Values below this fraction of the store-all peak are not modelled: they weigh nothing unless they certainly exist."""

INSTANTS_PER_ROUND, APART, NEAR_THE_PEAK = 2, 8, 0.9
"""New instants of a round, at least so many operators apart (fewer on small graphs), and how near to the budget."""

ALL_INSTANTS_LIMIT = 40
"""On graphs of so few operators, every operator is an instant from the start."""

LEAST_GAIN, ROUNDS_WITHOUT_GAIN = 1e-5, 3
"""Instants are added until so many rounds in a row raised the bound by less than this fraction of the step."""

CUT_ROUNDS, STALLED_ROUNDS = 60, 12
"""Most rounds of cuts, and after how many of them without a gain worth the name the search ends."""


@dataclass(frozen=True)
class Claim:
    """What is to be certified; the bound is a fraction of the step, `inf` if nothing is said to fit."""

    graph: Graph
    budget_bytes: int
    schedule: Schedule | None
    solver: str
    solver_scope: str
    solver_bound: float

    @property
    def wanted_seconds(self) -> float:
        """The bound at which the search may stop: what the solver reported."""
        return math.inf if self.schedule is None else self.solver_bound * self.graph.step_seconds


@dataclass(frozen=True)
class Proof:
    """A relaxation with its linear answer, and the answer with cuts (the same object if there are none)."""

    program: RelaxedProgram
    linear: LinearAnswer
    answer: LinearAnswer


def best_proof(claim: Claim, store_all: Simulation, cut_rounds: int, deadline: Deadline) -> Proof:
    """The proof with the best bound that the loop finds until the deadline."""
    start = claim.graph.last_forward
    start = 0 if start >= len(claim.graph) - 1 else max(0, start)
    profile = store_all.timeline_bytes
    instants = {0, max(range(start, len(profile)), key=profile.__getitem__)} if profile else {0}
    if len(claim.graph) <= ALL_INSTANTS_LIMIT:
        instants = set(range(max(1, len(claim.graph))))
    tiny_bytes = math.ceil(TINY_FRACTION * store_all.peak_bytes)
    best = _prove(claim, instants, tiny_bytes, cut_rounds, deadline)
    stalled = 0
    while best.answer.bound_seconds < claim.wanted_seconds and not deadline.passed:
        fresh = _more_instants(claim, best.program.relaxation.certain_bytes, instants)
        if not fresh:
            break
        instants = instants | set(fresh)
        try:
            found = _prove(claim, instants, tiny_bytes, cut_rounds, deadline, best.answer.bound_seconds)
        except LinearProgramError:
            if not deadline.passed:
                raise
            break
        except KeyboardInterrupt:  # before the linear answer of these instants: the one before stands
            deadline.limit_seconds = -math.inf
            break
        gain = found.answer.bound_seconds - best.answer.bound_seconds
        if gain > 0:
            best = found
        stalled = 0 if gain > LEAST_GAIN * claim.graph.step_seconds else stalled + 1
        if stalled == ROUNDS_WITHOUT_GAIN:
            break
    return best


def _prove(
    claim: Claim, instants: set[int], tiny_bytes: int, cut_rounds: int, deadline: Deadline, proven_seconds: float = 0.0
) -> Proof:
    """The linear relaxation at these instants, then round after round of cuts; others proved `proven_seconds`."""
    program = RelaxedProgram(Relaxation(claim.graph, claim.budget_bytes, tuple(sorted(instants)), tiny_bytes))
    linear = answer = program.solve_with_all_rows({}, max(5.0, deadline.seconds_left))
    stalled = 0
    with deadline.interruptible():
        for number in range(cut_rounds):
            deadline.say(f"{len(instants)} instants, cuts {number}", max(proven_seconds, answer.bound_seconds))
            done = answer.infeasible or answer.bound_seconds >= claim.wanted_seconds
            if done or stalled > STALLED_ROUNDS or deadline.passed or not program.add_cuts(answer):
                break
            try:
                found = program.solve_with_all_rows({}, deadline.seconds_left)
            except LinearProgramError:
                if not deadline.passed:
                    raise
                break
            gain = found.bound_seconds - answer.bound_seconds
            stalled = 0 if gain > LEAST_GAIN * claim.graph.step_seconds else stalled + 1
            answer = found
    return Proof(program, linear, answer if program.cuts else linear)


def _more_instants(claim: Claim, certain_bytes: list[int], instants: set[int]) -> list[int]:
    """Operators whose first run needs nearly the whole budget, the largest first, apart from all instants."""
    needs = dict(enumerate(certain_bytes)) if claim.schedule is None else _needs(claim.graph, claim.schedule)
    least = min(APART, len(claim.graph) // 16)
    fresh: list[int] = []
    for j in sorted(needs, key=lambda j: -needs[j]):
        apart = all(abs(j - other) > least for other in (*instants, *fresh))
        if apart and needs[j] >= NEAR_THE_PEAK * claim.budget_bytes:
            fresh.append(j)
        if len(fresh) == INSTANTS_PER_ROUND:
            break
    return fresh


def _needs(graph: Graph, schedule: Schedule) -> Mapping[int, int]:
    """Bytes at the first run of each operator in the schedule."""
    needs: dict[int, int] = {}
    runs = [step.operator for step in schedule.steps if isinstance(step, Compute)]
    for operator, live in zip(runs, simulate(graph, schedule).timeline_bytes, strict=True):
        needs.setdefault(operator, live)
    return needs
