"""What was decided, module by module: kept, released, recomputed, what that costs, and why.

Equal blocks are folded into one row: `h.{0-11}.attn` stands for twelve modules of which each keeps, releases and
recomputes the same.

A forward value is *kept* if it is in memory when the forward program ends, and *released* if the store-all schedule
would have it there and this one does not. What is released is computed again in the backward program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from graph_capture.formats import format_seconds
from graph_capture.graph import Graph, Operator
from planner.folding import fold_label, template_of
from planner.report.lifetimes import alive_after_forward
from solvers.schedule import Schedule

GIB = 2**30


@dataclass(frozen=True)
class ModuleRow:
    """One module, or several equal ones, and the forward operators that are its own.

    **Fields:** (sums over all of its modules)

    - `modules`: how many modules the row stands for.
    - `operators`, `recomputed_operators`: forward operators, and those of them that run more than once.
    - `kept_bytes`, `released_bytes`: of values that store-all keeps for the backward phase.
    - `recomputed_seconds`: of all executions after the first.
    - `rerun_seconds`: what one more run of the makers of its kept values would cost.
    - `pinned`: why its kept values cannot be recomputed; empty if one of them can.
    - `reason`: why it was decided so, in a few words.
    """

    label: str
    modules: int
    operators: int
    recomputed_operators: int
    kept_bytes: int
    released_bytes: int
    recomputed_seconds: float
    rerun_seconds: float = 0.0
    pinned: str = ""
    reason: str = ""


def module_rows(graph: Graph, schedule: Schedule) -> tuple[ModuleRow, ...]:
    """The rows of a schedule, in the order of the forward pass."""
    kept = alive_after_forward(graph, schedule)
    saved = alive_after_forward(graph, Schedule.store_all(graph)) | kept
    runs = Counter(schedule.order)
    members: dict[str, list[int]] = {}
    for index, operator in enumerate(graph.operators):
        if operator.phase == "forward":
            members.setdefault(operator.module, []).append(index)
    rows: list[ModuleRow] = []
    for module, indices in members.items():
        values = [v for i in indices for v in graph.operators[i].outputs if v in saved]
        makers = {graph.values[v].producer for v in values if v in kept}
        rows.append(
            ModuleRow(
                label=module,
                modules=1,
                operators=len(indices),
                recomputed_operators=sum(runs[i] > 1 for i in indices),
                kept_bytes=sum(graph.values[v].size_bytes for v in values if v in kept),
                released_bytes=sum(graph.values[v].size_bytes for v in values if v not in kept),
                recomputed_seconds=sum((runs[i] - 1) * graph.operators[i].seconds for i in indices),
                rerun_seconds=sum(graph.operators[i].seconds for i in makers),
                pinned=_pinned([graph.operators[i] for i in sorted(makers)]),
            )
        )
    return _with_reasons([_merged(group) for group in _folded(rows)])


def total_row(rows: Sequence[ModuleRow]) -> ModuleRow:
    """The sums over all rows."""
    return replace(_merged(rows), label="total", pinned="") if rows else ModuleRow("total", 0, 0, 0, 0, 0, 0.0)


def _pinned(makers: Sequence[Operator]) -> str:
    if not makers or any(operator.recomputable for operator in makers):
        return ""
    return makers[0].keep_reason or "it must not run twice"


def _with_reasons(rows: Sequence[ModuleRow]) -> tuple[ModuleRow, ...]:
    prices = [row.recomputed_seconds / row.released_bytes for row in rows if row.released_bytes]
    return tuple(replace(row, reason=_reason(row, max(prices, default=None))) for row in rows)


def _reason(row: ModuleRow, dearest: float | None) -> str:
    """Why; `dearest` is the most seconds per byte that any row pays, `None` if nothing is released."""
    if row.released_bytes:
        price = _price(row.recomputed_seconds / row.released_bytes)
        return f"{'in part' if row.kept_bytes else 'released'}, for {price}"
    if not row.kept_bytes:
        return "runs again for others" if row.recomputed_operators else "nothing to keep"
    if row.pinned:
        return f"must be kept: {row.pinned}"
    if dearest is None:
        return "everything fits"
    price = row.rerun_seconds / row.kept_bytes
    return f"dear: {_price(price)}" if price > dearest else "fits beside the rest"


def _price(seconds_per_byte: float) -> str:
    return f"{format_seconds(seconds_per_byte * GIB)} per GiB"


def _key(row: ModuleRow) -> Hashable:
    # Seconds of equal blocks may differ in their last digits where they were measured.
    seconds = f"{row.recomputed_seconds:.2g} {row.rerun_seconds:.2g}"
    return row.operators, row.recomputed_operators, row.kept_bytes, row.released_bytes, row.pinned, seconds


def _merged(group: Sequence[ModuleRow]) -> ModuleRow:
    label = fold_label([row.label for row in group]) if len({template_of(row.label) for row in group}) == 1 else ""
    return ModuleRow(
        label=label or "(model itself)",
        modules=sum(row.modules for row in group),
        operators=sum(row.operators for row in group),
        recomputed_operators=sum(row.recomputed_operators for row in group),
        kept_bytes=sum(row.kept_bytes for row in group),
        released_bytes=sum(row.released_bytes for row in group),
        recomputed_seconds=sum(row.recomputed_seconds for row in group),
        rerun_seconds=sum(row.rerun_seconds for row in group),
        pinned=group[0].pinned,
    )


def _folded(rows: Iterable[ModuleRow]) -> list[list[ModuleRow]]:
    groups: dict[Hashable, list[ModuleRow]] = {}
    for row in rows:
        groups.setdefault((template_of(row.label), _key(row)), []).append(row)
    return list(groups.values())
