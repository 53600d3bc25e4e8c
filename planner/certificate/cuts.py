"""Rows that follow from other rows because the columns are whole numbers: mixed-integer rounding, in integers.

Let Σ a_j·x_j ≥ b be a combination of rows with non-negative integer weights. Columns that can only be 0 drop out of
it, columns that can only be 1 move to the right side, and some columns are complemented: x = 1 - z, for any choice of
them. What is left reads Σ a_j·z_j ≥ b with z_j ∈ {0, 1, 2, ...}. For a divisor d ≥ 1 let f = b mod d, and f > 0. Then

    Σ (⌊a_j/d⌋·f + min(f, a_j mod d))·z_j  ≥  (⌊b/d⌋ + 1)·f.

*Proof* (Nemhauser and Wolsey 1990; Marchand and Wolsey 2001). Divide by d and write α_j = a_j/d, β = b/d, φ = f/d. Let
I = Σ ⌈α_j⌉·z_j over the j with frac(α_j) ≥ φ, plus Σ ⌊α_j⌋·z_j over the others, and s = Σ frac(α_j)·z_j over the
others. I is a whole number, s ≥ 0, and I + s ≥ β. If I ≥ ⌊β⌋ + 1 then I + s/φ ≥ ⌊β⌋ + 1. Else m = ⌊β⌋ - I ≥ 0 is a
whole number and s ≥ β - I = φ + m, so that s/φ ≥ 1 + m/φ ≥ 1 + m, and again I + s/φ ≥ ⌊β⌋ + 1. Multiply by f. ∎

The new row holds for all whole points of the relaxation, not only on one branch, and may be combined again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.certificate.relaxation import Column, Relaxation, Row


class CutError(ValueError):
    """A cut that cannot be derived; the message says why."""


@dataclass(frozen=True)
class Cut:
    """How a row is derived: `combine` has pairs (index of an earlier row, weight), `complement` names columns."""

    combine: tuple[tuple[int, int], ...]
    complement: tuple[Column, ...]
    divisor: int


def combined(relaxation: Relaxation, rows: Sequence[Row], combine: Sequence[tuple[int, int]]) -> Row:
    """The sum of rows with weights, without the columns that have one possible value only."""
    terms: dict[Column, int] = {}
    least = 0
    for index, weight in combine:
        if weight < 0 or not 0 <= index < len(rows):
            raise CutError(f"a cut combines row {index} of {len(rows)} with weight {weight}")
        least += weight * rows[index].least
        for column, coefficient in rows[index].terms.items():
            terms[column] = terms.get(column, 0) + weight * coefficient
    free: dict[Column, int] = {}
    for column, coefficient in terms.items():
        low, high = relaxation.box(column)
        if low == high:
            least -= coefficient * low
        elif coefficient:
            free[column] = coefficient
    return Row(free, least)


def rounded(row: Row, complement: Sequence[Column], divisor: int) -> Row:
    """The rounded row of the module docstring; raises :class:`CutError` if nothing is to be rounded."""
    if divisor < 1:
        raise CutError(f"a cut divides by {divisor}")
    flipped = {column for column in complement if column in row.terms}
    right = row.least - sum(row.terms[column] for column in flipped)
    part = right % divisor
    if not part:
        raise CutError("a cut has nothing to round: its right side is a multiple of the divisor")
    terms: dict[Column, int] = {}
    least = (right // divisor + 1) * part
    for column, coefficient in row.terms.items():
        signed = -coefficient if column in flipped else coefficient
        new = signed // divisor * part + min(part, signed % divisor)
        if column in flipped:
            least -= new
            new = -new
        if new:
            terms[column] = new
    return Row(terms, least)


def derive(relaxation: Relaxation, rows: Sequence[Row], cut: Cut) -> Row:
    """The row that a cut stands for; `rows` are those that it may combine."""
    return rounded(combined(relaxation, rows, cut.combine), cut.complement, cut.divisor)
