"""``verify_certificate(path)``: is the schedule what it is said to be, and does the proof prove its bound?

How far the check reaches. *Checked in exact arithmetic*: that the schedule is legal on the certificate's graph, its
seconds of recomputation, its peaks, that it keeps the budget; that every row with a multiplier is one of
:mod:`planner.certificate.relaxation`, rebuilt here from the graph, or a cut that follows from such rows by rounding
(:mod:`planner.certificate.cuts`); the bound that the multipliers of the linear relaxation prove; the bound of the
branch tree, that its splits cover all 0/1 points, and each leaf's bound. *Proven in prose* there: that every schedule
of the scope satisfies the rows, and that rounding is right (the tests hold both against exhaustive search). *Not
checked*: what the solver reported beyond that (`solver_bound`, repeated for comparison); that the graph is the model's,
and its prices and bytes the device's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from planner.certificate.cuts import CutError, derive
from planner.certificate.duality import proven_seconds
from planner.certificate.relaxation import Column, Relaxation, Row, UnknownRowError
from planner.certificate.replay import Replayed, replay
from planner.certificate.statement import SCOPE, Split, Statement, read_certificate
from planner.errors import CertificateError


@dataclass(frozen=True)
class CertificateReport:
    """What a certificate proves; fractions are of the store-all step. Everything but `solver*` was checked.

    **Fields:**

    - `overhead`, `peak_bytes`: of the schedule; `None` without one. `in_captured_order`: whether the schedule itself
      is one of those that the bounds speak of.
    - `linear_bound`: of the linear relaxation alone; `integer_bound`: of cuts and the branch tree, `None` if there are
      none. A bound of `inf` says that no schedule fits the budget. Both hold for `scope`.
    - `leaves`: of the tree; 1 if the cuts alone prove the bound. `cuts`: how many there are.
    - `solver_bound`: what the solver reported, for `solver_scope` in its own words; `solver_bound_checked`: whether the
      certificate proves as much.
    """

    budget_bytes: int
    operators: int
    peak_bytes: int | None
    first_peak_bytes: int | None
    later_peak_bytes: int | None
    overhead: float | None
    in_captured_order: bool | None
    linear_bound: float
    integer_bound: float | None
    leaves: int
    cuts: int
    scope: str
    solver: str
    solver_scope: str
    solver_bound: float

    @property
    def bound(self) -> float:
        """The best of the checked bounds."""
        return max(0.0, self.linear_bound, self.integer_bound or 0.0)

    @property
    def gap(self) -> float | None:
        """Overhead less the checked bound; `None` without a schedule."""
        return None if self.overhead is None else max(0.0, self.overhead - self.bound)

    @property
    def solver_bound_checked(self) -> bool:
        """Whether the checked bound is at least what the solver reported."""
        return self.bound >= self.solver_bound

    def __str__(self) -> str:
        lines = [f"budget              {self.budget_bytes:,} bytes, {self.operators:,} operators"]
        if self.overhead is None:
            lines.append("schedule            none: the certificate is about its absence")
        else:
            lines.append(f"schedule            legal, within the budget: peak {self.peak_bytes:,} bytes")
            lines.append(f"overhead            {100 * self.overhead:.4f} % of the step")
        lines.append(f"linear bound        {_percent(self.linear_bound)}")
        if self.integer_bound is not None:
            lines.append(
                f"integer bound       {_percent(self.integer_bound)}: {self.cuts:,} cuts, {self.leaves:,} leaves"
            )
        share = "checked" if self.solver_bound_checked else f"checked up to {_percent(self.bound)}"
        lines.append(f"bound of {self.solver}: {_percent(self.solver_bound)}, {share}")
        lines.append(f"the bounds hold for {self.scope}")
        return "\n".join(lines)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4f} % of the step" if math.isfinite(fraction) else "no schedule fits"


def verify_certificate(source: str | os.PathLike[str] | Mapping[str, Any]) -> CertificateReport:
    """Check a certificate, from its file or as parsed JSON.

    Raises :class:`~planner.errors.CertificateError` at the first claim that is not borne out: with the claim, and with
    what was found instead.
    """
    statement = read_certificate(source)
    claims = statement.claims
    _same("scope", claims["scope"], SCOPE)
    replayed = _check_schedule(statement)
    relaxation, rows = _rebuild(statement)
    step_seconds = sum((Fraction(o.seconds) for o in statement.graph.operators), Fraction(0))
    _same("step_seconds", claims["step_seconds"], str(step_seconds))
    linear = _fraction_of(proven_seconds(relaxation, rows, statement.linear, {}), step_seconds)
    _check_bound("linear_bound", claims["linear_bound"], linear)
    bounds = _leaf_bounds(statement, relaxation, rows, step_seconds)
    integer = min(bounds) if bounds else None
    _check_bound("integer_bound", claims["integer_bound"], integer)
    _same("leaves", claims["leaves"], len(bounds))
    overhead = None if replayed is None else _fraction_of(replayed.recomputed_seconds, step_seconds)
    _same("overhead", claims["overhead"], None if overhead is None else float(overhead))
    _check_consistent(overhead, replayed, linear if integer is None else max(linear, integer))
    return CertificateReport(
        budget_bytes=statement.budget_bytes,
        operators=len(statement.graph),
        peak_bytes=None if replayed is None else _peak(statement, replayed),
        first_peak_bytes=None if replayed is None else replayed.first_peak_bytes,
        later_peak_bytes=None if replayed is None else replayed.later_peak_bytes,
        overhead=None if overhead is None else float(overhead),
        in_captured_order=None if replayed is None else replayed.in_captured_order,
        linear_bound=float(round_down(linear)),
        integer_bound=None if integer is None else float(round_down(integer)),
        leaves=len(bounds),
        cuts=len(statement.cuts),
        scope=SCOPE,
        solver=_text("solver", claims["solver"]),
        solver_scope=_text("solver_scope", claims["solver_scope"]),
        solver_bound=_number("solver_bound", claims["solver_bound"]),
    )


def _peak(statement: Statement, replayed: Replayed) -> int:
    if statement.graph.gradient_accumulation:
        return max(replayed.first_peak_bytes, replayed.later_peak_bytes)
    return replayed.first_peak_bytes


def _check_schedule(statement: Statement) -> Replayed | None:
    claims = statement.claims
    if statement.schedule is None:
        for name in ("recomputed_seconds", "overhead", "peak_bytes", "first_peak_bytes", "later_peak_bytes"):
            _same(name, claims[name], None)
        return None
    replayed = replay(statement.graph, statement.schedule)
    peak_bytes = _peak(statement, replayed)
    if peak_bytes > statement.budget_bytes:
        raise CertificateError(f"the schedule's peak is {peak_bytes:,} bytes, the budget {statement.budget_bytes:,}")
    _same("first_peak_bytes", claims["first_peak_bytes"], replayed.first_peak_bytes)
    _same("later_peak_bytes", claims["later_peak_bytes"], replayed.later_peak_bytes)
    _same("peak_bytes", claims["peak_bytes"], peak_bytes)
    _same("recomputed_seconds", claims["recomputed_seconds"], str(replayed.recomputed_seconds))
    return replayed


def _rebuild(statement: Statement) -> tuple[Relaxation, list[Row]]:
    try:
        relaxation = Relaxation(
            statement.graph, statement.budget_bytes, statement.instants, statement.smallest_modelled_bytes
        )
        rows = [relaxation.row(name) for name in statement.rows]
        for cut in statement.cuts:
            rows.append(derive(relaxation, rows, cut))
        return relaxation, rows
    except UnknownRowError as error:
        raise CertificateError(f"the proof uses a row that the relaxation does not have: {error}") from error
    except CutError as error:
        raise CertificateError(f"the proof uses a cut that does not follow: {error}") from error
    except ValueError as error:
        raise CertificateError(f"the relaxation cannot be rebuilt: {error}") from error


def _leaf_bounds(
    statement: Statement, relaxation: Relaxation, rows: list[Row], step_seconds: Fraction
) -> list[Fraction | float]:
    """The bound of each leaf, from the root down; every node must be reached exactly once."""
    nodes = statement.tree
    if not nodes:
        return []
    reached = [False] * len(nodes)
    pending: list[tuple[int, dict[Column, int]]] = [(0, {})]
    bounds: list[Fraction | float] = []
    while pending:
        index, fixed = pending.pop()
        if not 0 <= index < len(nodes):
            raise CertificateError(f"the tree refers to node {index} of {len(nodes)}")
        if reached[index]:
            raise CertificateError(f"the tree refers to node {index} twice")
        reached[index] = True
        node = nodes[index]
        if isinstance(node, Split):
            _check_column(statement, node.column, fixed)
            pending += [(node.zero, {**fixed, node.column: 0}), (node.one, {**fixed, node.column: 1})]
        else:
            bounds.append(_fraction_of(proven_seconds(relaxation, rows, node, fixed), step_seconds))
    if not all(reached):
        raise CertificateError(f"node {reached.index(False)} of the tree belongs to no branch")
    return bounds


def _check_column(statement: Statement, column: Column, fixed: Mapping[Column, int]) -> None:
    kind, segment, index = column
    most = len(statement.graph) if kind == "r" else len(statement.graph.values)
    if not (0 <= segment < len(statement.instants) and 0 <= index < most):
        raise CertificateError(f"the tree splits at {list(column)}, which is no column")
    if column in fixed:
        raise CertificateError(f"the tree splits twice at {list(column)} on one branch")


def _check_consistent(overhead: Fraction | float | None, replayed: Replayed | None, bound: Fraction | float) -> None:
    """A schedule of the class that beats a bound would show that the theory is wrong."""
    if overhead is not None and replayed is not None and replayed.in_captured_order and bound > overhead:
        raise CertificateError("the schedule is cheaper than a proven bound: one of the two is wrong, please report it")


def _fraction_of(seconds: Fraction | None, step_seconds: Fraction) -> Fraction | float:
    if seconds is None:
        return math.inf
    return seconds / step_seconds if step_seconds else Fraction(0)


def round_down(bound: Fraction | float) -> float | str:
    """The largest floating-point number up to a bound, as a certificate states it; "inf" if nothing fits."""
    if isinstance(bound, float):
        return "inf"
    nearest = float(bound)
    return nearest if Fraction(nearest) <= bound else math.nextafter(nearest, -math.inf)


def _check_bound(name: str, stated: Any, found: Fraction | float | None) -> None:
    _same(name, stated, None if found is None else round_down(found))


def _same(name: str, stated: Any, found: Any) -> None:
    if type(stated) is not type(found) or stated != found:
        raise CertificateError(f"the certificate states {stated!r} as its {name}; found was {found!r}")


def _text(name: str, item: Any) -> str:
    if not isinstance(item, str):
        raise CertificateError(f"the claim {name!r} is {item!r}, not a text")
    return item


def _number(name: str, item: Any) -> float:
    if item == "inf":
        return math.inf
    if not isinstance(item, float) or not math.isfinite(item):
        raise CertificateError(f'the claim {name!r} is {item!r}, neither a finite number nor "inf"')
    return item
