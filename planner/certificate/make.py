"""Makes certificates: looks for instants, rows, multipliers and branches that prove as much of a bound as possible.

The relaxation is the certificate's own (:mod:`planner.certificate.relaxation`), refined by its own loop: instants 0 and
the peak of the store-all backward pass, then those at which the schedule needs most memory, as long as the linear
bound rises. What the solver did inside does not matter; its bound is what the certificate tries to reach.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graph_capture.graph import Graph
from planner.certificate.branching import Branching, Node
from planner.certificate.duality import Leaf, Multiplier, proven_seconds
from planner.certificate.linear import LinearAnswer, LinearProgramError, RelaxedProgram
from planner.certificate.relaxation import Relaxation
from planner.certificate.statement import FORMAT, SCHEMA_VERSION, SCOPE, checksum
from planner.certificate.verify import CertificateReport, round_down, verify_certificate
from planner.errors import CertificateError
from solvers.schedule import Compute, Schedule
from solvers.simulator import Simulation, simulate
from solvers.solution import Solution, Status

if TYPE_CHECKING:
    from planner.plan_file import Plan

TINY_FRACTION = 1e-4
"""Values below this fraction of the store-all peak are not modelled: they weigh nothing unless they certainly exist."""

LEAF_LIMIT = 500
MANTISSA_BITS = 30
"""Multipliers are rounded to so many bits: a bound that is 1e-9 of itself smaller, in a much smaller file."""

INSTANTS_PER_ROUND, APART, NEAR_THE_PEAK = 2, 8, 0.97
LEAST_GAIN = 1e-5
"""Instants are added as long as two of them raise the linear bound by this fraction of the step."""


@dataclass(frozen=True)
class Certificate:
    """A certificate as JSON data, and what its verifier says of it."""

    data: Mapping[str, Any]
    report: CertificateReport

    def to_json(self) -> str:
        """The text of the file, one top-level field per line."""
        rows = (f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in self.data.items())
        return "{\n" + ",\n".join(rows) + "\n}\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the certificate to `path`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


@dataclass(frozen=True)
class _Claim:
    """What is to be certified."""

    graph: Graph
    budget_bytes: int
    schedule: Schedule | None
    solver: str
    solver_scope: str
    solver_bound: float


def certify(
    graph: Graph,
    budget_bytes: int,
    solution: Solution,
    *,
    time_limit_seconds: float = 60.0,
    leaf_limit: int = LEAF_LIMIT,
) -> Certificate:
    """A certificate for a solution: its schedule, and as much of its bound as the limits allow to prove.

    **Arguments:**

    - `solution`: with a schedule, or with the proof that there is none.
    - `time_limit_seconds`: for the search of the proof. The linear bound is always there.
    - `leaf_limit`: of the branch tree that proves an integer bound; 1 for the linear bound alone.

    Raises :class:`~planner.errors.CertificateError` if the solution has neither a schedule nor a claim that nothing
    fits, or if that could not be proven within the limits.
    """
    if solution.schedule is None and solution.status is not Status.INFEASIBLE:
        raise CertificateError(f"there is nothing to certify: {solution.status.value}")
    bound = solution.lower_bound if solution.schedule is not None else math.inf
    claim = _Claim(graph, budget_bytes, solution.schedule, solution.solver, solution.bound_scope, bound)
    return _make(claim, time_limit_seconds, leaf_limit)


def export_certificate(
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    time_limit_seconds: float = 60.0,
    leaf_limit: int = LEAF_LIMIT,
) -> CertificateReport:
    """Write the certificate of a plan to `path`; returns what its verifier says of it. See :func:`certify`."""
    claim = _Claim(
        plan.to_graph(), plan.budget_bytes, plan.to_schedule(), plan.solver, plan.bound_scope, plan.lower_bound
    )
    certificate = _make(claim, time_limit_seconds, leaf_limit)
    certificate.save(path)
    return certificate.report


def _make(claim: _Claim, time_limit_seconds: float, leaf_limit: int) -> Certificate:
    until = time.monotonic() + time_limit_seconds
    graph = claim.graph
    store_all = simulate(graph, Schedule.store_all(graph))
    proof = _Proof(claim, store_all, until)
    tree: list[Node] = []
    wanted = claim.solver_bound * graph.step_seconds
    if proof.answer.bound_seconds < wanted and leaf_limit > 1:
        branching = Branching(proof.program, proof.answer)
        branching.grow(wanted, leaf_limit, until)
        tree = branching.nodes if branching.leaves > 1 else []
    data = _data(claim, proof, tree)
    report = verify_certificate(data)
    if claim.schedule is None and report.bound < math.inf:
        raise CertificateError(
            "that nothing fits was not proven within the limits: allow more time or leaves; what is proven is that "
            f"a schedule needs an overhead of {report.bound:.4%}"
        )
    return Certificate(data, report)


class _Proof:
    """The relaxation with the best linear bound that the loop finds."""

    def __init__(self, claim: _Claim, store_all: Simulation, until: float) -> None:
        self.claim = claim
        self.until = until
        self.smallest_modelled_bytes = math.ceil(TINY_FRACTION * store_all.peak_bytes)
        start = claim.graph.last_forward
        start = 0 if start >= len(claim.graph) - 1 else max(0, start)
        profile = store_all.timeline_bytes
        instants = {0, max(range(start, len(profile)), key=profile.__getitem__)} if profile else {0}
        self.program, self.answer = self._solve(instants)
        while time.monotonic() < until and self.answer.bound_seconds < claim.solver_bound * claim.graph.step_seconds:
            fresh = self._more_instants(instants)
            if not fresh:
                return
            instants |= set(fresh)
            try:
                program, answer = self._solve(instants)
            except LinearProgramError:
                if time.monotonic() < until:
                    raise
                return
            gain = answer.bound_seconds - self.answer.bound_seconds
            if gain > 0:
                self.program, self.answer = program, answer
            if gain < LEAST_GAIN * claim.graph.step_seconds:
                return

    def _solve(self, instants: set[int]) -> tuple[RelaxedProgram, LinearAnswer]:
        relaxation = Relaxation(
            self.claim.graph, self.claim.budget_bytes, tuple(sorted(instants)), self.smallest_modelled_bytes
        )
        program = RelaxedProgram(relaxation)
        return program, program.solve_with_all_rows({}, max(5.0, self.until - time.monotonic()))

    def _more_instants(self, instants: set[int]) -> list[int]:
        """Operators whose first run needs nearly the whole budget, the largest first, apart from all instants."""
        fresh: list[int] = []
        needs = self._needs()
        for j in sorted(needs, key=lambda j: -needs[j]):
            apart = all(abs(j - other) > APART for other in (*instants, *fresh))
            if apart and needs[j] >= NEAR_THE_PEAK * self.claim.budget_bytes:
                fresh.append(j)
            if len(fresh) == INSTANTS_PER_ROUND:
                break
        return fresh

    def _needs(self) -> dict[int, int]:
        """Bytes at the first run of each operator, in the schedule or, without one, in the rows' certain part."""
        if self.claim.schedule is None:
            return dict(enumerate(self.program.relaxation.certain_bytes))
        timeline = simulate(self.claim.graph, self.claim.schedule).timeline_bytes
        needs: dict[int, int] = {}
        runs = [step.operator for step in self.claim.schedule.steps if isinstance(step, Compute)]
        for operator, live in zip(runs, timeline, strict=True):
            needs.setdefault(operator, live)
        return needs


def _data(claim: _Claim, proof: _Proof, tree: Sequence[Node]) -> dict[str, Any]:
    """The certificate: the rows that have a multiplier somewhere, renumbered, and everything that is claimed."""
    program = proof.program
    answers = [proof.answer, *(node.answer for node in tree if node.column is None)]
    number = {row: n for n, row in enumerate(sorted({row for answer in answers for row in answer.multipliers}))}
    linear = _leaf(proof.answer, number)
    rows = [program.rows[row] for row in number]
    step_seconds = sum((Fraction(o.seconds) for o in claim.graph.operators), Fraction(0))

    def proven(leaf: Mapping[str, Any], fixed: Mapping[tuple[str, int, int], int]) -> Fraction | float:
        multipliers: tuple[Multiplier, ...] = tuple((r, m, e) for r, m, e in leaf["multipliers"])
        seconds = proven_seconds(program.relaxation, rows, Leaf(multipliers, leaf["infeasible"]), fixed)
        if seconds is None:
            return math.inf
        return seconds / step_seconds if step_seconds else Fraction(0)

    nodes: list[dict[str, Any]] = []
    bounds: list[Fraction | float] = []
    fixed: dict[int, dict[tuple[str, int, int], int]] = {0: {}}
    for index, node in enumerate(tree):  # parents stand before their children
        if node.column is None:
            nodes.append(_leaf(node.answer, number))
            bounds.append(proven(nodes[-1], fixed[index]))
        else:
            nodes.append({"column": list(node.column), "zero": node.zero, "one": node.one})
            fixed[node.zero] = {**fixed[index], node.column: 0}
            fixed[node.one] = {**fixed[index], node.column: 1}
    data: dict[str, Any] = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "budget_bytes": claim.budget_bytes,
        "claims": _claims(claim, step_seconds)
        | {
            "linear_bound": round_down(proven(linear, {})),
            "integer_bound": round_down(min(bounds)) if bounds else None,
            "leaves": len(bounds),
        },
        "instants": list(program.relaxation.instants),
        "smallest_modelled_bytes": proof.smallest_modelled_bytes,
        "graph": claim.graph.to_dict(),
        "schedule": None if claim.schedule is None else claim.schedule.to_list(),
        "rows": [list(program.names[row]) for row in number],
        "linear": linear,
        "tree": nodes,
    }
    data = json.loads(json.dumps(data))  # tuples are lists in a file, and so they are here
    data["checksum"] = checksum(data)
    return data


def _claims(claim: _Claim, step_seconds: Fraction) -> dict[str, Any]:
    claims: dict[str, Any] = {
        "scope": SCOPE,
        "step_seconds": str(step_seconds),
        "recomputed_seconds": None,
        "overhead": None,
        "peak_bytes": None,
        "first_peak_bytes": None,
        "later_peak_bytes": None,
        "solver": claim.solver,
        "solver_scope": claim.solver_scope,
        "solver_bound": float(claim.solver_bound) if math.isfinite(claim.solver_bound) else "inf",
    }
    if claim.schedule is not None:
        simulation = simulate(claim.graph, claim.schedule)
        again = _repetitions(claim.schedule)
        seconds = sum((Fraction(claim.graph.operators[o].seconds) for o in again), Fraction(0))
        claims |= {
            "recomputed_seconds": str(seconds),
            "overhead": float(seconds / step_seconds) if step_seconds else 0.0,
            "peak_bytes": simulation.peak_bytes,
            "first_peak_bytes": simulation.first_peak_bytes,
            "later_peak_bytes": simulation.later_peak_bytes,
        }
    return claims


def _repetitions(schedule: Schedule) -> list[int]:
    seen: set[int] = set()
    again: list[int] = []
    for step in schedule.steps:
        if isinstance(step, Compute):
            if step.operator in seen:
                again.append(step.operator)
            seen.add(step.operator)
    return again


def _leaf(answer: LinearAnswer, number: Mapping[int, int]) -> dict[str, Any]:
    multipliers: list[list[int]] = []
    for row, y in sorted(answer.multipliers.items()):
        fraction, exponent = math.frexp(y)
        mantissa = int(fraction * (1 << MANTISSA_BITS))
        multipliers.append([number[row], mantissa, exponent - MANTISSA_BITS])
    return {"multipliers": multipliers, "infeasible": answer.infeasible}
