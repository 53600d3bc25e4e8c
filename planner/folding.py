"""Folds the names of equal modules: `h.0.attn`, `h.1.attn`, `h.2.attn` become `h.{0-2}.attn`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def template_of(module: str) -> str:
    """The name with a star for every index: modules can only be folded together if their templates agree."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def fold_label(modules: Sequence[str]) -> str:
    """One label for modules of one template; an index that varies is written as the ranges that it takes.

    >>> fold_label(["h.0.attn", "h.1.attn", "h.3.attn"])
    'h.{0-1,3}.attn'
    """
    columns = zip(*(module.split(".") for module in dict.fromkeys(modules)), strict=True)
    parts: list[str] = []
    for column in columns:
        distinct = list(dict.fromkeys(column))
        parts.append(distinct[0] if len(distinct) == 1 else f"{{{_ranges(int(part) for part in distinct)}}}")
    return ".".join(parts)


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
