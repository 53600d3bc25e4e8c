"""The first table that `print(plan)` shows: what was asked for, what it costs, and how good that is.

Plain text, so that it reads the same in a terminal, a log file and a notebook. Rows are pairs of label and text; the
command line may draw them in another way.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from graph_capture.formats import format_bytes, format_fraction

if TYPE_CHECKING:
    from planner.plan_file import Plan

Row = tuple[str, str]


def plan_rows(plan: Plan) -> list[Row]:
    """The rows of the table, in order; continuation lines have an indented label."""
    rows: list[Row] = [
        ("model", f"{plan.model.class_name} ({len(plan.model.parameters)} parameter tensors)"),
        ("mode", "training" if plan.training else "evaluation"),
        ("loss", plan.loss.location + (f": {plan.loss.note}" if plan.loss.note else "")),
        ("budget", _budget(plan)),
        *_ledger(plan),
        *_memory(plan),
        *_price(plan),
        ("operators", _operators(plan)),
        *_pins(plan),
        ("seconds", f"capture {plan.capture_seconds:.2f}, solve {plan.solve_seconds:.2f}"),
    ]
    if plan.message:
        rows.append(("message", plan.message))
    rows.extend(("note", note) for note in plan.notes)
    return rows


def plan_text(plan: Plan) -> str:
    """The table as text."""
    rows = plan_rows(plan)
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def _budget(plan: Plan) -> str:
    size = format_bytes(plan.budget_bytes)
    said_already = plan.budget.requested in (size, f"{plan.budget_bytes:,} bytes")
    return size if said_already else f"{plan.budget.requested} = {size}"


def _ledger(plan: Plan) -> list[Row]:
    """What the budget covers, at the peak without a plan and with it."""
    from planner.report import ledger_of_plan

    ledger = ledger_of_plan(plan)
    over_bytes = ledger.before_bytes - ledger.budget_bytes
    left = format_bytes(abs(over_bytes), short=True)
    lines = [
        ("store-all", "plan", "at the peak"),
        *(
            (format_bytes(row.before_bytes, short=True), format_bytes(row.after_bytes, short=True), row.label)
            for row in ledger.rows
        ),
        (
            f"-{left}" if over_bytes > 0 else left,
            format_bytes(ledger.unused_bytes, short=True),
            "left of the budget" + (" (store-all is over it)" if over_bytes > 0 else ""),
        ),
    ]
    texts = [f"{before:>12}  {after:>12}  {label}" for before, after, label in lines]
    return [("  covers", texts[0]), *(("", text) for text in texts[1:])]


def _memory(plan: Plan) -> list[Row]:
    return [
        ("eager's peak", f"{format_bytes(plan.eager_peak_bytes)}, {plan.eager_peak_source}"),
        ("store-all's peak", format_bytes(plan.store_all_peak_bytes) + _share(plan, plan.store_all_peak_bytes)),
        ("predicted peak", format_bytes(plan.predicted_peak_bytes) + _share(plan, plan.predicted_peak_bytes)),
        ("  first micro-batch", format_bytes(plan.first_peak_bytes) + _binds(plan, "first")),
        ("  later micro-batch", format_bytes(plan.later_peak_bytes) + _binds(plan, "later")),
    ]


def _share(plan: Plan, size_bytes: int) -> str:
    return f", {100 * size_bytes / plan.eager_peak_bytes:.1f} % of eager's" if plan.eager_peak_bytes else ""


def _binds(plan: Plan, regime: str) -> str:
    if plan.regime == regime:
        return ", binds"
    counted = regime == "first" or plan.to_graph().gradient_accumulation
    return "" if counted else ", not planned for (no gradient accumulation)"


def _pins(plan: Plan) -> list[Row]:
    from planner.report.pins import pin_texts

    return pin_texts(plan.to_graph(), plan.to_schedule(), plan.pins)


def _price(plan: Plan) -> list[Row]:
    from planner.report.meaning import meanings

    figures = (plan.overhead, plan.lower_bound, plan.gap)
    return [
        *(
            (label, f"{format_fraction(x)}: {said}")
            for x, (label, said) in zip(figures, meanings(plan).items(), strict=True)
        ),
        ("status", _status(plan.status)),
        ("solver", plan.solver),
        ("search class", _search_class(plan.search_class)),
    ]


def _status(name: str) -> str:
    from solvers.solution import Status

    return Status[name].value


def _search_class(name: str) -> str:
    from solvers.solution import SearchClass

    return SearchClass[name].value if name in SearchClass.__members__ else name


def _operators(plan: Plan) -> str:
    runs = Counter(plan.to_schedule().order)
    again = {index: count - 1 for index, count in runs.items() if count > 1}
    once = len(runs) - len(again)
    return f"{once} run once, {len(again)} recomputed ({sum(again.values())} extra executions)"
