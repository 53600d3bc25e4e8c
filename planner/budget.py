"""Budgets: what a user writes, and the bytes that it means.

Every entry of this table is accepted by :func:`parse_budget`; whatever it does not list is refused with one sentence
that says what to write instead.

| written             | means                                                                  |
| ------------------- | ---------------------------------------------------------------------- |
| `8_589_934_592`     | an integer: exactly so many bytes                                      |
| `"12GiB"`           | 12 x 1024**3 bytes; also `KiB`, `MiB`, `TiB`, with or without a space  |
| `"8GB"`             | 8 x 1000**3 bytes; also `KB`, `MB`, `TB`                               |
| `"1.5 GiB"`         | fractions are exact and rounded down to whole bytes                    |
| `"8589934592 B"`    | bytes with their unit; also `byte`, `bytes`                            |
| `"60%"`             | 60 % of the peak of the plain (eager) training step                    |
| `Budget(...)`       | itself                                                                 |

A number without a unit is an error when it is text, and so is a float: nobody can tell whether `0.6` is a fraction
and `8` bytes or GiB, and a guess would be a budget that does not bound what the user means.
"""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from planner.errors import BudgetError

UNIT_BYTES = {
    "b": 1,
    "byte": 1,
    "bytes": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
    "tib": 1024**4,
}
"""Bytes of each unit that a budget may carry; case does not matter, because memory is never counted in bits here."""

LARGEST_BYTES = 2**63 - 1
"""The largest budget: what a signed 64-bit integer, the solvers' own limit, can hold."""

_SHAPE = re.compile(r"([+-]?)(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+|%)?", re.ASCII)
_NOT_A_NUMBER = re.compile(r"[+-]?(nan|inf(inity)?)\s*([a-z]+|%)?", re.ASCII | re.IGNORECASE)
_ADVICE = 'write bytes with a unit ("12GiB", "8GB"), a percentage of eager\'s peak ("60%") or an integer of bytes'


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget as it was asked for: either bytes, or a percentage of eager's peak.

    **Fields:**

    - `requested`: the user's own words, for reports.
    - `size_bytes`: the bytes, if it was given in bytes.
    - `percent`: the percentage, if it was given as one; exact, so that 60 % of a peak does not depend on rounding.
    """

    requested: str
    size_bytes: int | None = None
    percent: Decimal | None = None

    def __post_init__(self) -> None:
        if (self.size_bytes is None) == (self.percent is None):
            raise BudgetError(f"budget {self.requested!r} must be either bytes or a percentage; {_ADVICE}")
        if self.percent is not None and not self.percent.is_finite():
            raise BudgetError(f"budget {self.requested!r} is not a finite number; {_ADVICE}")
        amount = self.size_bytes if self.size_bytes is not None else self.percent
        if amount is not None and amount <= 0:
            what = "zero" if amount == 0 else "negative"
            raise BudgetError(f"budget {self.requested!r} is {what}; {_ADVICE}")
        if self.size_bytes is not None and self.size_bytes > LARGEST_BYTES:
            raise BudgetError(f"budget {self.requested!r} is more than any machine can address; {_ADVICE}")

    def resolve(self, eager_peak_bytes: int) -> int:
        """The bytes that the budget means for a step whose eager peak is `eager_peak_bytes`; rounded down."""
        if self.size_bytes is not None:
            return self.size_bytes
        assert self.percent is not None
        if eager_peak_bytes <= 0:
            raise BudgetError(f"budget {self.requested!r} is a percentage of eager's peak, which is not known here")
        resolved = math.floor(Fraction(self.percent) * eager_peak_bytes / 100)
        if resolved < 1:
            raise BudgetError(
                f"budget {self.requested!r} of {eager_peak_bytes:,} bytes is less than one byte; {_ADVICE}"
            )
        return resolved

    def __str__(self) -> str:
        return self.requested


def parse_budget(budget: int | str | Budget) -> Budget:
    """Read a budget; raises :class:`~planner.errors.BudgetError` for whatever the module's table does not list.

    >>> parse_budget("12GiB").size_bytes
    12884901888
    >>> parse_budget("60%").resolve(1_000_000)
    600000
    >>> parse_budget("8")
    Traceback (most recent call last):
    planner.errors.BudgetError: budget '8' has no unit; write "8GiB", "8%" of eager's peak, or "8 bytes"
    """
    if isinstance(budget, Budget):
        return budget
    if isinstance(budget, bool):
        raise BudgetError(f"budget {budget!r} is a boolean; {_ADVICE}")
    if isinstance(budget, numbers.Integral):  # also NumPy's integers
        size = int(budget)
        # Python refuses to print integers of thousands of digits.
        return Budget(f"{size:,} bytes" if abs(size) <= LARGEST_BYTES else "of a huge integer", size_bytes=size)
    if isinstance(budget, str):
        return _parse_text(budget)
    if isinstance(budget, numbers.Real):
        raise BudgetError(
            f"budget {budget!r} is a {type(budget).__name__} without a unit; {_float_advice(float(budget))}"
        )
    raise BudgetError(f"budget {budget!r} is a {type(budget).__name__}; {_ADVICE}")


def _parse_text(text: str) -> Budget:
    stripped = text.strip()
    if len(stripped) > 64:
        raise BudgetError(f"budget {stripped[:20] + '...'!r} is too long to be a number with a unit; {_ADVICE}")
    if not stripped:
        raise BudgetError(f"budget {text!r} is empty; {_ADVICE}")
    if _NOT_A_NUMBER.fullmatch(stripped):
        raise BudgetError(f"budget {text!r} is not a finite number; {_ADVICE}")
    match = _SHAPE.fullmatch(stripped)
    if match is None:
        comma = " (use a decimal point, and no thousands separators)" if "," in stripped or "_" in stripped else ""
        raise BudgetError(f"budget {text!r} is not a number with a unit{comma}; {_ADVICE}")
    sign, digits, unit = match.groups()
    amount = -Decimal(digits) if sign == "-" else Decimal(digits)
    if unit is None and amount > 0:
        raise BudgetError(f"budget {text!r} has no unit; {_text_advice(amount, digits)}")
    if unit is None:
        return Budget(
            stripped, size_bytes=math.floor(amount)
        )  # zero and negative numbers are refused for what they are
    if unit == "%":
        return Budget(stripped, percent=amount)
    factor = UNIT_BYTES.get(unit.lower())
    if factor is None:
        letter = unit[0].upper()
        hint = f'write "{digits}{letter}iB" or "{digits}{letter}B"' if letter in "KMGT" else _ADVICE
        raise BudgetError(f"budget {text!r} has the unknown unit {unit!r}; {hint}")
    size = math.floor(Fraction(amount) * factor)
    if size == 0 and amount > 0:
        raise BudgetError(f"budget {text!r} is less than one byte; {_ADVICE}")
    return Budget(stripped, size_bytes=size)


def _text_advice(amount: Decimal, digits: str) -> str:
    if 0 < amount < 1:
        return (
            f'write "{(amount * 100).normalize():f}%" for a fraction of eager\'s peak, or bytes with a unit ("12GiB")'
        )
    return f'write "{digits}GiB", "{digits}%" of eager\'s peak, or "{digits} bytes"'


def _float_advice(amount: float) -> str:
    if 0 < amount < 1:
        return f'write "{100 * amount:g}%" for a fraction of eager\'s peak, or bytes with a unit ("12GiB")'
    return _ADVICE
