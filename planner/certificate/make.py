"""Makes certificates: looks for instants, rows, multipliers and branches that prove as much of a bound as possible.

The relaxation is the certificate's own (:mod:`planner.certificate.relaxation`), refined by its own loop: instants 0 and
the peak of the store-all backward pass, then those at which the schedule needs most memory, as long as the bound rises;
cuts at each of them, and a branch tree where these do not suffice. What the solver did inside does not matter; its
bound is what the certificate tries to reach.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graph_capture.graph import Graph
from planner.certificate.branching import Branching, Node
from planner.certificate.deadline import Deadline
from planner.certificate.proof import CUT_ROUNDS, Claim, best_proof
from planner.certificate.verify import CertificateReport, verify_certificate
from planner.certificate.write import certificate_data
from planner.errors import CertificateError
from solvers.hints import ProgressListener
from solvers.simulator import simulate_store_all
from solvers.solution import Solution, Status

if TYPE_CHECKING:
    from planner.plan_file import Plan

LEAF_LIMIT = 500


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


def certify(
    graph: Graph,
    budget_bytes: int,
    solution: Solution,
    *,
    time_limit_seconds: float = 60.0,
    leaf_limit: int = LEAF_LIMIT,
    cut_rounds: int = CUT_ROUNDS,
    progress: ProgressListener | None = None,
) -> Certificate:
    """A certificate for a solution: its schedule, and as much of its bound as the limits allow to prove.

    **Arguments:**

    - `solution`: with a schedule, or with the proof that there is none.
    - `time_limit_seconds`: for the search of the proof. The linear bound is always there.
    - `cut_rounds`: of cuts; 0 for none. `leaf_limit`: of the branch tree; 1 for none. Both prove an integer bound.
    - `progress`: told how far the search is. Ctrl-C ends it with what is proven by then.

    Raises :class:`~planner.errors.CertificateError` if the solution has neither a schedule nor a claim that nothing
    fits, or if that could not be proven within the limits.
    """
    if solution.schedule is None and solution.status is not Status.INFEASIBLE:
        raise CertificateError(f"there is nothing to certify: {solution.status.value}")
    bound = solution.lower_bound if solution.schedule is not None else math.inf
    claim = Claim(graph, budget_bytes, solution.schedule, solution.solver, solution.bound_scope, bound)
    deadline = Deadline(time_limit_seconds, graph.step_seconds, solution.overhead, progress)
    return _make(claim, deadline, leaf_limit, cut_rounds)


def export_certificate(
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    time_limit_seconds: float = 60.0,
    leaf_limit: int = LEAF_LIMIT,
    cut_rounds: int = CUT_ROUNDS,
    progress: ProgressListener | None = None,
) -> CertificateReport:
    """Write the certificate of a plan to `path`; returns what its verifier says of it. See :func:`certify`."""
    claim = Claim(
        plan.to_graph(), plan.budget_bytes, plan.to_schedule(), plan.solver, plan.bound_scope, plan.lower_bound
    )
    deadline = Deadline(time_limit_seconds, claim.graph.step_seconds, plan.overhead, progress)
    certificate = _make(claim, deadline, leaf_limit, cut_rounds)
    certificate.save(path)
    return certificate.report


def _make(claim: Claim, deadline: Deadline, leaf_limit: int, cut_rounds: int) -> Certificate:
    graph = claim.graph
    proof = best_proof(claim, simulate_store_all(graph), cut_rounds, deadline)
    nodes = [Node(proof.answer)] if proof.answer is not proof.linear else []
    if proof.answer.bound_seconds < claim.wanted_seconds and leaf_limit > 1:
        branching = Branching(proof.program, proof.answer)
        with deadline.interruptible():
            branching.grow(claim.wanted_seconds, leaf_limit, deadline)
        nodes = branching.nodes if branching.leaves > 1 else nodes
    data = certificate_data(claim, proof, nodes)
    report = verify_certificate(data)
    if claim.schedule is None and report.bound < math.inf:
        raise CertificateError(
            "that nothing fits was not proven within the limits: allow more time or leaves; what is proven is that "
            f"a schedule needs an overhead of {report.bound:.4%}"
        )
    return Certificate(data, report)
