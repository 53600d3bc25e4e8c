"""Figures as text: fractions of a step and seconds; bytes are :func:`planner.budget.format_bytes`."""

from __future__ import annotations

import math


def format_fraction(fraction: float) -> str:
    """A fraction of the step as a percentage; small ones keep their digits, infinity is said in words.

    >>> format_fraction(0.1149), format_fraction(0.00004)
    ('11.49 %', '0.004 %')
    """
    if math.isinf(fraction):
        return "infinite"
    percent = 100 * fraction
    return f"{percent:.2f} %" if percent >= 0.01 or percent == 0 else f"{percent:.1g} %"


def format_seconds(seconds: float) -> str:
    """Seconds with a unit that leaves three digits before the point at the most.

    >>> format_seconds(0.0335), format_seconds(94.6e-6)
    ('33.5 ms', '94.6 us')
    """
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("unreachable")
