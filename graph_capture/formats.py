"""Figures as text: bytes, fractions of a step, and seconds."""

from __future__ import annotations

import math


def format_bytes(size_bytes: int, *, short: bool = False) -> str:
    """Both forms of a size; the first alone if `short`.

    >>> format_bytes(8 * 2**30), format_bytes(1536, short=True)
    ('8.00 GiB (8,589,934,592 bytes)', '1.50 KiB')
    """
    brief = _brief(size_bytes)
    return brief if short or abs(size_bytes) < 1024 else f"{brief} ({size_bytes:,} bytes)"


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


def _brief(size_bytes: int) -> str:
    if abs(size_bytes) < 1024:
        return f"{size_bytes} byte" if abs(size_bytes) == 1 else f"{size_bytes} bytes"
    units = ("KiB", "MiB", "GiB", "TiB", "PiB")
    # What rounds to 1024.00 of a unit belongs to the next one.
    power = next((p for p in range(1, 6) if abs(round(size_bytes / 1024**p, 2)) < 1024), 5)
    return f"{size_bytes / 1024**power:.2f} {units[power - 1]}"
