"""What the budget covers, line by line: at the peak of the store-all step (before) and at the plan's (after)."""

from __future__ import annotations

from dataclasses import dataclass

from planner.report.peak import Lines


@dataclass(frozen=True)
class LedgerRow:
    """Bytes of one line at both peaks. `schedulable`: whether a schedule can change it."""

    label: str
    before_bytes: int
    after_bytes: int
    schedulable: bool


@dataclass(frozen=True)
class Ledger:
    """The lines, and what they add up to.

    **Fields:**

    - `before_bytes`, `after_bytes`: the peaks without and with the plan; the sums of the rows.
    - `unused_bytes`: what the plan leaves of `budget_bytes`.
    """

    rows: tuple[LedgerRow, ...]
    budget_bytes: int
    before_bytes: int
    after_bytes: int

    @property
    def unused_bytes(self) -> int:
        """Budget minus the plan's peak; never negative for a plan that could be constructed."""
        return self.budget_bytes - self.after_bytes


def ledger_of(before: Lines, after: Lines, resident: frozenset[str], budget_bytes: int) -> Ledger:
    """Put the lines of both peaks side by side; `resident` are the labels that no schedule can change."""
    first, second = {**dict.fromkeys(_ALWAYS, 0), **dict(before)}, dict(after)
    rows = tuple(
        LedgerRow(label, first.get(label, 0), second.get(label, 0), label not in resident)
        for label in sorted({**first, **second}, key=lambda label: _place(label, resident))
    )
    return Ledger(rows, budget_bytes, sum(first.values()), sum(second.values()))


_ALWAYS = ("activations", "gradients", "workspace of the operator")
"""Lines that stand there even where they are nothing at both peaks, so that nobody wonders whether they count."""

_ORDER = ("parameters", "buffers", "inputs", "bookkeeping")
_LAST = ("activations", "outputs", "gradients", ".grad of earlier micro-batches", "workspace of the operator")


def _place(label: str, resident: frozenset[str]) -> tuple[int, int]:
    """What the model itself is comes first, then what the user declared, then what the step makes."""
    if label in _ORDER:
        return 0, _ORDER.index(label)
    if label in resident:
        return 1, 0
    return 2, _LAST.index(label) if label in _LAST else len(_LAST)
