"""Looks for cuts that a fractional point violates; part of the maker of certificates.

The heuristic is that of Marchand and Wolsey (2001): start from a memory row that binds; replace columns k in it by the
flow rows that bind for them (k + r ≥ 1 and the like), which gives a knapsack over the repetitions; complement what
the point has above one half; try the coefficients of fractional columns as divisors; keep what is violated most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from planner.certificate.cuts import Cut, combined, rounded
from planner.certificate.relaxation import Column, Relaxation, Row, RowName

LEAST_VIOLATION = 1e-4
"""Relative to the length of the cut's vector of coefficients."""

DIVISORS = 12


def violated_cuts(
    relaxation: Relaxation,
    names: Sequence[RowName],
    rows: Sequence[Row],
    multipliers: Mapping[int, float],
    point: Mapping[Column, float],
) -> Iterator[tuple[Cut, Row]]:
    """For each binding memory row the cuts that the point violates most, one per way to combine it."""
    bases = [i for i in multipliers if names[i][0] in ("memory", "cut")]
    supports = _supports(names, rows, multipliers)
    for base in bases:
        for rounds in (0, 1, 2):
            combine = _combination(rows, base, supports, rounds)
            found = _best_rounding(relaxation, rows, combine, point)
            if found is not None:
                yield found


def _supports(
    names: Sequence[RowName], rows: Sequence[Row], multipliers: Mapping[int, float]
) -> dict[Column, list[int]]:
    """For each column the binding flow rows that have it with coefficient 1, the strongest first."""
    supports: dict[Column, list[int]] = {}
    for i in sorted(multipliers, key=lambda i: -multipliers[i]):
        if names[i][0] not in ("memory", "cut"):
            for column, coefficient in rows[i].terms.items():
                if coefficient == 1:
                    supports.setdefault(column, []).append(i)
    return supports


def _combination(
    rows: Sequence[Row], base: int, supports: Mapping[Column, Sequence[int]], rounds: int
) -> dict[int, int]:
    """Weights of rows: the base, and as often as asked what makes its negative k and h (then r) columns vanish."""
    weights = {base: 1}
    terms = dict(rows[base].terms)
    for step in range(rounds):
        negative = [c for c, a in terms.items() if a < 0 and c in supports and (step or c[0] != "r")]
        if not negative:
            break
        for column in negative:
            row = next((i for i in supports[column] if i not in weights), None)
            weight = -terms.get(column, 0)
            if row is None or weight <= 0:
                continue
            weights[row] = weight
            for other, coefficient in rows[row].terms.items():
                terms[other] = terms.get(other, 0) + weight * coefficient
    return weights


def _best_rounding(
    relaxation: Relaxation, rows: Sequence[Row], weights: Mapping[int, int], point: Mapping[Column, float]
) -> tuple[Cut, Row] | None:
    combine = tuple(sorted(weights.items()))
    row = combined(relaxation, rows, combine)
    complement = tuple(column for column in row.terms if point.get(column, 0.0) > 0.5)
    right = row.least - sum(row.terms[column] for column in complement)
    sizes = {abs(a): min(x, 1.0 - x) for c, a in row.terms.items() if 1e-6 < (x := point.get(c, 0.0)) < 1.0 - 1e-6}
    divisors = sorted(sizes, key=lambda a: -sizes[a])[:DIVISORS]
    best: tuple[float, Cut, Row] | None = None
    for divisor in dict.fromkeys(d for base in divisors for d in (base, base // 2, base // 4) if d > 1):
        if right % divisor == 0:
            continue
        cut = rounded(row, complement, divisor)
        violation = _violation(cut, point)
        if violation > LEAST_VIOLATION and (best is None or violation > best[0]):
            best = (violation, Cut(combine, complement, divisor), cut)
    return None if best is None else best[1:]


def _violation(row: Row, point: Mapping[Column, float]) -> float:
    length = math.sqrt(sum(float(a) * float(a) for a in row.terms.values()))
    missing = row.least - sum(a * point.get(column, 0.0) for column, a in row.terms.items())
    return missing / length if length else 0.0
