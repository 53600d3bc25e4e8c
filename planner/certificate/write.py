"""Writes a proof as certificate data: the rows and cuts that have a multiplier somewhere, and everything claimed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from planner.certificate.branching import Node
from planner.certificate.cuts import Cut
from planner.certificate.duality import Leaf, Multiplier, proven_seconds
from planner.certificate.linear import LinearAnswer, RelaxedProgram
from planner.certificate.proof import Claim, Proof
from planner.certificate.relaxation import Column
from planner.certificate.statement import FORMAT, SCHEMA_VERSION, SCOPE, checksum
from planner.certificate.verify import round_down
from solvers.schedule import Compute, Schedule
from solvers.simulator import simulate

MANTISSA_BITS = 30
"""Multipliers are rounded to so many bits: a bound that is 1e-9 of itself smaller, in a much smaller file."""


def certificate_data(claim: Claim, proof: Proof, tree: Sequence[Node]) -> dict[str, Any]:
    """The certificate as JSON data. Its bounds are computed as the verifier will compute them, and rounded down."""
    program = proof.program
    answers = [proof.linear, *(node.answer for node in tree if node.column is None)]
    number = _numbers(program, {row for answer in answers for row in answer.multipliers})
    step_seconds = sum((Fraction(o.seconds) for o in claim.graph.operators), Fraction(0))
    rows = [program.rows[row] for row in number]

    def proven(leaf: Mapping[str, Any], fixed: Mapping[Column, int]) -> Fraction | float:
        multipliers: tuple[Multiplier, ...] = tuple((r, m, e) for r, m, e in leaf["multipliers"])
        seconds = proven_seconds(program.relaxation, rows, Leaf(multipliers, leaf["infeasible"]), fixed)
        if seconds is None:
            return math.inf
        return seconds / step_seconds if step_seconds else Fraction(0)

    linear = _leaf(proof.linear, number)
    nodes: list[dict[str, Any]] = []
    bounds: list[Fraction | float] = []
    fixed: dict[int, dict[Column, int]] = {0: {}}
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
        "smallest_modelled_bytes": program.relaxation.smallest_modelled_bytes,
        "graph": claim.graph.to_dict(),
        "schedule": None if claim.schedule is None else claim.schedule.to_list(),
        "rows": [list(program.names[row]) for row in number if row not in program.cuts],
        "cuts": [_cut(program.cuts[row], number) for row in number if row in program.cuts],
        "linear": linear,
        "tree": nodes,
    }
    data = json.loads(json.dumps(data))  # tuples are lists in a file, and so they are here
    data["checksum"] = checksum(data)
    return data


def _numbers(program: RelaxedProgram, used: set[int]) -> dict[int, int]:
    """New numbers for the rows that are used, or that a used cut combines: rows first, then cuts in their order."""
    for row in sorted(program.cuts, reverse=True):  # a cut combines earlier rows only
        if row in used:
            used = used | {index for index, _ in program.cuts[row].combine}
    ordered = sorted(used, key=lambda row: (row in program.cuts, row))
    return {row: n for n, row in enumerate(ordered)}


def _cut(cut: Cut, number: Mapping[int, int]) -> dict[str, Any]:
    combine = [[number[row], weight] for row, weight in cut.combine]
    return {"combine": combine, "complement": [list(c) for c in cut.complement], "divisor": cut.divisor}


def _claims(claim: Claim, step_seconds: Fraction) -> dict[str, Any]:
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
