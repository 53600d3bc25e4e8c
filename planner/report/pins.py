"""What was asked for by pins and what became of it, and what is held because it cannot be computed twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from graph_capture.formats import format_bytes
from graph_capture.graph import Graph
from planner.folding import fold_label, template_of
from planner.report.lifetimes import alive_after_forward
from solvers.schedule import Schedule

if TYPE_CHECKING:
    from planner.pins import Kind, Pins

Row = tuple[str, str]


@dataclass(frozen=True)
class PinRow:
    """One pattern of `keep` or `recompute`.

    **Fields:**

    - `modules`: the modules that it decides for, equal ones folded; `operators`: their forward operators.
    - `size_bytes`: of `keep`: what the schedule holds of them over the turn from forward to backward. Of `recompute`:
      what store-all would hold there and no schedule may.
    - `held_all_the_same`: of `recompute`: what cannot be computed twice, with the reason.
    """

    kind: Kind
    pattern: str
    modules: tuple[str, ...]
    operators: int
    size_bytes: int
    held_all_the_same: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The row in words."""
        what = "held over the turn" if self.kind == "keep" else "not held over the turn"
        where = ", ".join(self.modules) or "an inner pattern decides for all of them"
        said = (
            f"{self.pattern}: {where}; {self.operators} operators, {format_bytes(self.size_bytes, short=True)} {what}"
        )
        return "; ".join([said, *(f"held all the same: {reason}" for reason in self.held_all_the_same)])


@dataclass(frozen=True)
class ForcedRow:
    """Values of equal modules that are held over the turn for one reason: the user's wish, or their nature."""

    label: str
    target: str
    operators: int
    size_bytes: int
    reason: str

    @property
    def text(self) -> str:
        """The row in words."""
        count = f" x{self.operators}" if self.operators > 1 else ""
        return f"{self.label}: {self.target}{count}, {format_bytes(self.size_bytes, short=True)}: {self.reason}"


def pin_rows(graph: Graph, schedule: Schedule, pins: Pins) -> tuple[PinRow, ...]:
    """One row per pattern, in the order in which they were given."""
    if not pins:
        return ()
    from planner.pins import can_be_released, decisions_of  # late: it brings pydantic, which a report can do without

    decisions = decisions_of(graph, pins)
    kept = alive_after_forward(graph, schedule)
    saved = alive_after_forward(graph, Schedule.store_all(graph))
    rows: list[PinRow] = []
    for kind, pattern in pins.patterns():
        mine = [i for i, d in enumerate(decisions) if d is not None and (d.kind, d.pattern) == (kind, pattern)]
        places = {d.place for i in mine if (d := decisions[i]) is not None}
        values = {v for i in mine for v in graph.operators[i].outputs}
        counted = values & (kept if kind == "keep" else saved.intersection(graph.released))
        stuck: dict[str, int] = {}
        for i in mine if kind == "recompute" else ():
            operator = graph.operators[i]
            held = sum(graph.values[v].size_bytes for v in operator.outputs if v in kept)
            if held and not can_be_released(graph, operator):
                reason = operator.keep_reason or "its result is returned to the caller"
                stuck[f"{operator.name}, {reason}"] = held
        rows.append(
            PinRow(
                kind=kind,
                pattern=pattern,
                modules=_folded(places),
                operators=len(mine),
                size_bytes=sum(graph.values[v].size_bytes for v in counted),
                held_all_the_same=tuple(stuck),
            )
        )
    return tuple(rows)


def forced_rows(graph: Graph, schedule: Schedule) -> tuple[ForcedRow, ...]:
    """What the forward phase makes, must not run twice, and holds over the turn; the biggest rows first."""
    kept = alive_after_forward(graph, schedule)
    groups: dict[tuple[str, str, str], list[tuple[str, int]]] = {}
    for operator in graph.operators:
        if operator.phase != "forward" or operator.recomputable:
            continue
        held = [v for v in operator.outputs if v in kept or graph.values[v].kind != "activation"]
        if held:
            key = (template_of(operator.module), operator.target, operator.keep_reason)
            size_bytes = sum(graph.values[v].size_bytes for v in held)
            groups.setdefault(key, []).append((operator.module, size_bytes))
    rows = [
        ForcedRow(
            label=fold_label([module for module, _ in group]) or "(model itself)",
            target=target,
            operators=len(group),
            size_bytes=sum(size for _, size in group),
            reason=reason,
        )
        for (_, target, reason), group in groups.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.size_bytes))


def pin_texts(graph: Graph, schedule: Schedule, pins: Pins) -> list[Row]:
    """The rows for the table of a plan: label and text."""
    asked: list[Row] = [(row.kind, row.text) for row in pin_rows(graph, schedule, pins)]
    return [*asked, *(("must be kept", row.text) for row in forced_rows(graph, schedule))]


def _folded(places: set[str]) -> tuple[str, ...]:
    groups: dict[str, list[str]] = {}
    for place in sorted(places):
        groups.setdefault(template_of(place), []).append(place)
    return tuple(fold_label(group) or "(model itself)" for group in groups.values())
