"""The bound that non-negative multiples of rows prove: weak duality, in integers.

Let every point of a box l ≤ x ≤ u that is of interest satisfy A x ≥ b. For any multipliers y ≥ 0, whatever they are,

    c·x  ≥  c·x - y·(A x - b)  =  y·b + (c - yᵀA)·x  ≥  y·b + Σ_j min over l_j ≤ x_j ≤ u_j of (c - yᵀA)_j · x_j.

Nothing has to be optimal or feasible in the dual: multipliers that a floating-point solver rounded prove what they
prove. With c = 0, a right side above 0 proves that there is no point at all (Farkas).

Branching: fixing a 0/1 column to 0 and to 1 covers all points, so that the smallest bound of a tree's leaves holds for
all of them.

Multipliers are `mantissa · 2^exponent`, and a price is a binary floating-point number: on a common power of two,
everything is an integer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from planner.certificate.relaxation import Column, Relaxation, Row

Multiplier = tuple[int, int, int]
"""(index of a row, mantissa, exponent): mantissa · 2^exponent seconds per unit of the row."""


@dataclass(frozen=True)
class Leaf:
    """Multipliers for the points of one box; `infeasible`: they are to prove that the box holds no point."""

    multipliers: tuple[Multiplier, ...]
    infeasible: bool


def proven_seconds(
    relaxation: Relaxation, rows: Sequence[Row], leaf: Leaf, fixed: Mapping[Column, int]
) -> Fraction | None:
    """The seconds of recomputation that every schedule in the box needs; `None` if it is proven that there is none.

    **Arguments:**

    - `fixed`: columns with the value that the branches to this leaf gave them.
    """
    boxes = {column: relaxation.box(column) for column in fixed}
    if any(not low <= fixed[column] <= high for column, (low, high) in boxes.items()):
        return None  # a branch contradicts the range of a column
    prices = relaxation.graph.operators
    used = {index for kind, _, index in fixed if kind == "r"}
    used |= {index for row, _, _ in leaf.multipliers for kind, _, index in rows[row].terms if kind == "r"}
    ratios = {o: (0, 1) if leaf.infeasible else prices[o].seconds.as_integer_ratio() for o in used}
    shift = max([0, *(den.bit_length() - 1 for _, den in ratios.values()), *(-e for _, _, e in leaf.multipliers)])
    total = 0
    reduced: dict[Column, int] = dict.fromkeys(fixed, 0)
    for index, mantissa, exponent in leaf.multipliers:
        y = mantissa << (shift + exponent)
        row = rows[index]
        total += y * row.least
        for column, coefficient in row.terms.items():
            reduced[column] = reduced.get(column, 0) - y * coefficient
    for column, slope in reduced.items():
        kind, _, index = column
        if kind == "r":
            numerator, denominator = ratios[index]
            slope += (numerator << shift) // denominator  # exact: the denominator is a power of two up to 2^shift
        low, high = (fixed[column],) * 2 if column in fixed else relaxation.box(column)
        total += slope * (low if slope >= 0 else high)
    if leaf.infeasible:
        return None if total > 0 else Fraction(0)
    return Fraction(total, 1 << shift)
