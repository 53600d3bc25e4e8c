"""Two plans side by side: their figures, and the modules that they decide differently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from graph_capture.formats import format_bytes, format_fraction, format_seconds
from planner.folding import template_of
from planner.report.modules import ModuleRow, module_rows

if TYPE_CHECKING:
    from planner.plan_file import Plan

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class FigureRow:
    """One figure of both plans, as text, and how the second differs."""

    label: str
    first: str
    second: str
    difference: str


@dataclass(frozen=True)
class ModuleDifference:
    """Modules of one name, indices left out, whose decisions differ; sums over all of them.

    **Fields:** `kept_bytes`, `recomputed_seconds`: of the first and of the second plan.
    """

    label: str
    kept_bytes: tuple[int, int]
    released_bytes: tuple[int, int]
    recomputed_seconds: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Two plans side by side.

    **Fields:**

    - `notes`: what makes the comparison less than straight: other models, inputs, or prices.
    """

    figures: tuple[FigureRow, ...]
    modules: tuple[ModuleDifference, ...]
    notes: tuple[str, ...]


def compare(first: Plan, second: Plan) -> Comparison:
    """Compare two plans; of different models too, and the notes say so."""
    return Comparison(tuple(_figures(first, second)), tuple(_modules(first, second)), tuple(_notes(first, second)))


def _figures(first: Plan, second: Plan) -> list[FigureRow]:
    plans = first, second
    sizes = {
        "budget": [p.budget_bytes for p in plans],
        "peak": [p.predicted_peak_bytes for p in plans],
        "store-all's peak": [p.store_all_peak_bytes for p in plans],
    }
    fractions = {
        "overhead": [p.overhead for p in plans],
        "lower bound": [p.lower_bound for p in plans],
        "gap": [p.gap for p in plans],
    }
    seconds: dict[str, list[float]] = {
        "step": [p.simulation().seconds for p in plans],
        "recomputation": [p.simulation().recomputed_seconds for p in plans],
        "solving": [p.solve_seconds for p in plans],
    }
    names = {
        "solver": [p.solver for p in plans],
        "status": [p.status.lower() for p in plans],
        "device": [p.environment.device for p in plans],
        "model": [p.model.class_name.rsplit(".", 1)[-1] for p in plans],
    }
    rows = [FigureRow(k, _size(a), _size(b), _signed(b - a, _size)) for k, (a, b) in sizes.items()]
    rows += [FigureRow(k, format_fraction(a), format_fraction(b), _points(a, b)) for k, (a, b) in fractions.items()]
    rows += [FigureRow(k, _time(a), _time(b), _signed(b - a, _time)) for k, (a, b) in seconds.items()]
    rows += [FigureRow(k, a, b, "" if a == b else "differs") for k, (a, b) in names.items()]
    return rows


def _modules(first: Plan, second: Plan) -> list[ModuleDifference]:
    totals: list[dict[str, list[ModuleRow]]] = [{}, {}]
    for rows, plan in zip(totals, (first, second), strict=True):
        for row in module_rows(plan.to_graph(), plan.to_schedule()):
            rows.setdefault(_template(row.label), []).append(row)
    found: list[ModuleDifference] = []
    for label in dict.fromkeys([*totals[0], *totals[1]]):
        one, other = (rows.get(label, []) for rows in totals)
        difference = ModuleDifference(
            label,
            (sum(r.kept_bytes for r in one), sum(r.kept_bytes for r in other)),
            (sum(r.released_bytes for r in one), sum(r.released_bytes for r in other)),
            (sum(r.recomputed_seconds for r in one), sum(r.recomputed_seconds for r in other)),
        )
        if difference.kept_bytes[0] != difference.kept_bytes[1] or _differ(*difference.recomputed_seconds):
            found.append(difference)
    return found


def _template(label: str) -> str:
    """The name without its indices, folded ones too: `h.{0-11}.attn` and `h.3.attn` are both `h.*.attn`."""
    return template_of(".".join("0" if part.startswith("{") else part for part in label.split(".")))


def _notes(first: Plan, second: Plan) -> list[str]:
    notes: list[str] = []
    if first.structure_fingerprint != second.structure_fingerprint:
        notes.append("the plans are of different graphs: overheads are fractions of different steps")
    elif first.fingerprint != second.fingerprint:
        beside = _resident_differences(first, second)
        if beside:
            notes.append(f"the budgets cover other memory that no schedule changes: {', '.join(beside)}")
        if not beside or [v.size_bytes for v in first.to_graph().values] != [
            v.size_bytes for v in second.to_graph().values
        ]:
            what = "another batch, another dtype or another device"
            notes.append(f"the plans are of the same graph at other sizes: {what}")
    elif _differ(first.step_seconds, second.step_seconds):
        notes.append("the same graph is priced differently: overheads are fractions of different steps")
    return notes


def _resident_differences(first: Plan, second: Plan) -> list[str]:
    """The lines of resident memory that differ, with both sizes."""
    one, other = first.to_graph().resident_bytes, second.to_graph().resident_bytes
    labels = [label for label in {**one, **other} if one.get(label, 0) != other.get(label, 0)]
    return [f"{label} {_size(one.get(label, 0))} and {_size(other.get(label, 0))}" for label in labels]


def _differ(a: float, b: float) -> bool:
    return abs(a - b) > 1e-9 * max(abs(a), abs(b))


def _size(size_bytes: int) -> str:
    return format_bytes(size_bytes, short=True)


def _time(seconds: float) -> str:
    return format_seconds(seconds) if seconds else "0"


def _signed(amount: Number, written: Callable[[Number], str]) -> str:
    return "" if not amount else f"+{written(amount)}" if amount > 0 else f"-{written(-amount)}"


def _points(a: float, b: float) -> str:
    """The difference of two percentages."""
    return "" if a == b or abs(b - a) == float("inf") else f"{100 * (b - a):+.2f} points"
