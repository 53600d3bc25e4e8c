"""A mixed-integer linear program as plain arrays, and its MathOpt form.

Built by the ten thousand columns in Python, so it keeps to lists of numbers; a MathOpt ``ModelProto`` is filled from
them with a handful of bulk calls (the expression API needs a Python object for every term).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from solvers.backends import backend


@dataclass
class LinearProgram:
    """Minimise costs · x over lower ≤ x ≤ upper and row_lower ≤ A x ≤ row_upper; A is stored by rows."""

    costs: list[float] = field(default_factory=list[float])
    lower: list[float] = field(default_factory=list[float])
    upper: list[float] = field(default_factory=list[float])
    integer: list[bool] = field(default_factory=list[bool])
    row_lower: list[float] = field(default_factory=list[float])
    row_upper: list[float] = field(default_factory=list[float])
    row_ids: list[int] = field(default_factory=list[int])
    column_ids: list[int] = field(default_factory=list[int])
    coefficients: list[float] = field(default_factory=list[float])

    def add_column(self, cost: float = 0.0, upper: float = 1.0, integer: bool = True) -> int:
        """A column between 0 and `upper`; returns its index."""
        self.costs.append(cost)
        self.lower.append(0.0)
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.costs) - 1

    def add_row(self, terms: Iterable[tuple[int, float]], lower: float, upper: float) -> int:
        """A row lower ≤ Σ coefficient · column ≤ upper; terms of one column are added up. Returns its index."""
        merged: dict[int, float] = {}
        for column, coefficient in terms:
            merged[column] = merged.get(column, 0.0) + coefficient
        row = len(self.row_lower)
        for column in sorted(merged):
            if merged[column] != 0.0:
                self.row_ids.append(row)
                self.column_ids.append(column)
                self.coefficients.append(merged[column])
        self.row_lower.append(lower)
        self.row_upper.append(upper)
        return row

    def at_least(self, terms: Iterable[tuple[int, float]], bound: float) -> int:
        """Σ coefficient · column ≥ bound."""
        return self.add_row(terms, bound, math.inf)

    def at_most(self, terms: Iterable[tuple[int, float]], bound: float) -> int:
        """Σ coefficient · column ≤ bound."""
        return self.add_row(terms, -math.inf, bound)

    def serialized(self) -> bytes:
        """The program as a serialized MathOpt ``ModelProto``."""
        with backend("ortools"):
            from ortools.math_opt import model_pb2  # pyright: ignore[reportMissingTypeStubs]

        proto = model_pb2.ModelProto()
        variables, rows, matrix = proto.variables, proto.linear_constraints, proto.linear_constraint_matrix
        variables.ids.extend(range(len(self.costs)))
        variables.lower_bounds.extend(self.lower)
        variables.upper_bounds.extend(self.upper)
        variables.integers.extend(self.integer)
        priced = [column for column, cost in enumerate(self.costs) if cost != 0.0]
        proto.objective.linear_coefficients.ids.extend(priced)
        proto.objective.linear_coefficients.values.extend(self.costs[column] for column in priced)
        rows.ids.extend(range(len(self.row_lower)))
        rows.lower_bounds.extend(self.row_lower)
        rows.upper_bounds.extend(self.row_upper)
        matrix.row_ids.extend(self.row_ids)
        matrix.column_ids.extend(self.column_ids)
        matrix.coefficients.extend(self.coefficients)
        return proto.SerializeToString()
