"""The relaxation as a linear program in floating point, solved by GLOP; where multipliers and branches come from.

Part of the maker of certificates: nothing here is believed by the verifier.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from planner.certificate.cuts import Cut
from planner.certificate.relaxation import Column, Relaxation, Row, RowName
from planner.certificate.separation import violated_cuts

PERCENT = 100.0
VIOLATED = 1e-7
"""A memory row that a point exceeds by this fraction of the budget is added."""

ROWS_PER_ROUND, ROUNDS = 40, 30


class LinearProgramError(RuntimeError):
    """GLOP did not solve a program, and did not say that it is infeasible."""


@dataclass(frozen=True)
class LinearAnswer:
    """Multipliers by row (seconds per unit of the row), the bound that they prove in seconds, and the point.

    `infeasible`: the multipliers prove that there is no point; the bound is infinite and the point is empty.
    """

    multipliers: dict[int, float]
    bound_seconds: float
    point: dict[Column, float]
    infeasible: bool = False

    def fractional(self) -> dict[Column, float]:
        """The 0/1 columns that are neither, and their values."""
        return {c: x for c, x in self.point.items() if c[0] != "h" and 1e-6 < x < 1 - 1e-6}


class RelaxedProgram:
    """The linear program of a relaxation; columns can be fixed, memory rows come where a point violates them.

    `names` and `rows` are the rows that are in the program, `cuts` says how some of them are derived from others;
    multipliers refer to rows by index.
    """

    def __init__(self, relaxation: Relaxation) -> None:
        from ortools.math_opt.python import mathopt  # pyright: ignore[reportMissingTypeStubs]

        self._mathopt: Any = mathopt
        self.relaxation = relaxation
        self.step_seconds = relaxation.graph.step_seconds or 1.0
        self.names: list[RowName] = []
        self.rows: list[Row] = []
        self.cuts: dict[int, Cut] = {}
        self._scales: list[float] = []
        self._model: Any = mathopt.Model()
        self._columns: dict[Column, Any] = {}
        self._constraints: list[Any] = []
        self._present: set[RowName] = set()
        # Fixed at 0, or the one column that makes every row satisfiable when infeasibility is to be proven.
        self._shortfall: Any = self._model.add_variable(lb=0.0, ub=0.0)
        for name in relaxation.flow_rows():
            self._add_row(name, relaxation.row(name))
        for start in relaxation.instants:
            self._add_row(("memory", start), self._memory_rows[start])
        self._solver: Any = mathopt.IncrementalSolver(self._model, mathopt.SolverType.GLOP)
        self._fixed: Mapping[Column, int] = {}

    @cached_property
    def _memory_rows(self) -> list[Row]:
        return [self.relaxation.row(("memory", j)) for j in range(len(self.relaxation.graph))]

    def _column(self, column: Column) -> Any:
        if column not in self._columns:
            low, high = self.relaxation.box(column)
            variable = self._model.add_variable(lb=float(low), ub=float(high))
            if column[0] == "r":
                self._model.objective.set_linear_coefficient(variable, self._price(column))
            self._columns[column] = variable
        return self._columns[column]

    def _price(self, column: Column) -> float:
        return PERCENT * self.relaxation.graph.operators[column[2]].seconds / self.step_seconds

    def _scale(self, name: RowName, row: Row) -> float:
        if name[0] == "cut":
            return float(max(abs(a) for a in row.terms.values()))
        return float(self.relaxation.budget_bytes or 1) if name[0] == "memory" else 1.0

    def _add_row(self, name: RowName, row: Row) -> None:
        scale = self._scale(name, row)
        constraint = self._model.add_linear_constraint(lb=row.least / scale)
        for column, coefficient in row.terms.items():
            if self.relaxation.box(column) != (0, 0):
                constraint.set_coefficient(self._column(column), coefficient / scale)
        constraint.set_coefficient(self._shortfall, 1.0)
        self.names.append(name)
        self.rows.append(row)
        self._scales.append(scale)
        self._present.add(name)
        self._constraints.append(constraint)

    def add_cuts(self, answer: LinearAnswer) -> int:
        """Add the cuts that an answer violates; returns how many."""
        found = list(violated_cuts(self.relaxation, self.names, self.rows, answer.multipliers, answer.point))
        for cut, row in found:
            self.cuts[len(self.rows)] = cut
            self._add_row(("cut", len(self.cuts)), row)
        return len(found)

    def solve(self, fixed: Mapping[Column, int], seconds: float) -> LinearAnswer:
        """The relaxation with some columns fixed; raises :class:`LinearProgramError` at a limit."""
        for column in {**self._fixed, **fixed}:
            low, high = (fixed[column],) * 2 if column in fixed else self.relaxation.box(column)
            variable = self._column(column)
            variable.lower_bound, variable.upper_bound = float(low), float(high)
        self._fixed = dict(fixed)
        result = self._run(seconds)
        reason = self._mathopt.TerminationReason
        if result.termination.reason in (reason.INFEASIBLE, reason.INFEASIBLE_OR_UNBOUNDED):
            return LinearAnswer(self._infeasibility(seconds), math.inf, {}, infeasible=True)
        if result.termination.reason is not reason.OPTIMAL:
            raise LinearProgramError(f"the linear program was not solved: {result.termination}")
        values = zip(self._columns, result.variable_values(list(self._columns.values())), strict=True)
        bound = result.objective_value() * self.step_seconds / PERCENT
        return LinearAnswer(self._multipliers(result), bound, dict(values))

    def _run(self, seconds: float) -> Any:
        """Solve from the last basis; where GLOP gets lost (it may, numerically), once more from nothing."""
        mathopt = self._mathopt
        limit = datetime.timedelta(seconds=max(0.01, seconds))
        warm = mathopt.SolveParameters(
            time_limit=limit, lp_algorithm=mathopt.LPAlgorithm.DUAL_SIMPLEX, presolve=mathopt.Emphasis.OFF
        )
        result = self._solver.solve(params=warm)
        lost = (mathopt.TerminationReason.NO_SOLUTION_FOUND, mathopt.TerminationReason.IMPRECISE)
        if result.termination.reason in lost:
            result = mathopt.solve(
                self._model, mathopt.SolverType.GLOP, params=mathopt.SolveParameters(time_limit=limit)
            )
        return result

    def _multipliers(self, result: Any) -> dict[int, float]:
        duals: Sequence[float] = result.dual_values(self._constraints)
        unit = self.step_seconds / PERCENT
        return {i: y * unit / self._scales[i] for i, y in enumerate(duals) if y > 1e-12}

    def _infeasibility(self, seconds: float) -> dict[int, float]:
        """Multipliers of the rows that cannot hold together, by the least shortfall that would make them hold."""
        model, objective = self._model, self._model.objective
        priced = [c for c in self._columns if c[0] == "r"]
        self._shortfall.upper_bound = math.inf
        objective.set_linear_coefficient(self._shortfall, 1.0)
        for column in priced:
            objective.set_linear_coefficient(self._columns[column], 0.0)
        try:
            result = self._run(seconds)
            if result.termination.reason is not self._mathopt.TerminationReason.OPTIMAL:
                raise LinearProgramError(f"infeasibility was not proven: {result.termination}")
            return self._multipliers(result)
        finally:
            self._shortfall.upper_bound = 0.0
            model.objective.set_linear_coefficient(self._shortfall, 0.0)
            for column in priced:
                objective.set_linear_coefficient(self._columns[column], self._price(column))

    def add_violated(self, point: Mapping[Column, float]) -> int:
        """Add the memory rows that a point violates most, apart from one another; returns how many."""
        budget = self.relaxation.budget_bytes
        excess: dict[int, float] = {}
        for j, row in enumerate(self._memory_rows):
            if ("memory", j) not in self._present:
                missing = row.least - sum(a * point.get(c, 0.0) for c, a in row.terms.items())
                if missing > VIOLATED * budget:
                    excess[j] = missing
        near = (-2, -1, 1, 2)
        peaks = [j for j in excess if all(excess[j] >= excess.get(j + d, 0.0) for d in near)]
        peaks = sorted(peaks, key=lambda j: -excess[j])[:ROWS_PER_ROUND]
        for j in peaks:
            self._add_row(("memory", j), self._memory_rows[j])
        return len(peaks)

    def solve_with_all_rows(self, fixed: Mapping[Column, int], seconds: float) -> LinearAnswer:
        """Solve, add violated memory rows, and so on until there are none (or for a bounded number of rounds)."""
        answer = self.solve(fixed, seconds)
        for _ in range(ROUNDS):
            if answer.infeasible or not self.add_violated(answer.point):
                break
            answer = self.solve(fixed, seconds)
        return answer
