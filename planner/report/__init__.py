"""What a plan decided, what its budget covers, and what fills the memory at its peak.

Computed from the plan's own graph and schedule, without the model and without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.report.ledger import Ledger, LedgerRow, ledger_of
from planner.report.meaning import meanings
from planner.report.modules import ModuleRow, module_rows
from planner.report.peak import AliveRow, PeakReport, peak_lines, peak_report
from planner.report.pins import ForcedRow, PinRow, forced_rows, pin_rows
from solvers.schedule import Schedule

if TYPE_CHECKING:
    from planner.plan_file import Plan

__all__ = [
    "AliveRow",
    "ForcedRow",
    "Ledger",
    "LedgerRow",
    "ModuleRow",
    "PeakReport",
    "PinRow",
    "PlanReport",
    "ledger_of_plan",
    "report_on",
]


@dataclass(frozen=True)
class PlanReport:
    """All parts of the report of one plan.

    **Fields:**

    - `ledger`: what the budget covers, before and after. `meanings`: overhead, bound and gap in a sentence each.
    - `modules`: what was decided, by module. `peak`: the instant of the plan's peak; `None` if nothing runs.
    - `pins`: what was asked for by `keep` and `recompute`. `forced`: what is held because it must not run twice.
    """

    ledger: Ledger
    meanings: dict[str, str]
    modules: tuple[ModuleRow, ...]
    peak: PeakReport | None
    pins: tuple[PinRow, ...] = ()
    forced: tuple[ForcedRow, ...] = ()


def report_on(plan: Plan) -> PlanReport:
    """The report of a plan."""
    graph, schedule = plan.to_graph(), plan.to_schedule()
    peak = peak_report(graph, schedule, plan.simulation())
    return PlanReport(
        ledger=ledger_of_plan(plan),
        meanings=meanings(plan),
        modules=module_rows(graph, schedule),
        peak=peak,
        pins=pin_rows(graph, schedule, plan.pins),
        forced=forced_rows(graph, schedule),
    )


def ledger_of_plan(plan: Plan) -> Ledger:
    """What the budget of a plan covers, at the peak of the store-all step and at its own."""
    graph = plan.to_graph()
    store_all = Schedule.store_all(graph)
    before = peak_lines(graph, store_all, plan.store_all_simulation())
    after = peak_lines(graph, plan.to_schedule(), plan.simulation())
    return ledger_of(before, after, frozenset(graph.resident_bytes), plan.budget_bytes)
