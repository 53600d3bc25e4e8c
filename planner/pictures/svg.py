"""A few lines of SVG: elements with escaped text, scales, and the styles that make a picture readable in any theme.

Colours are CSS variables, so that a page can set them; :func:`standalone` adds them to a picture in a file of its own.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graph_capture.formats import format_bytes, format_seconds

LIGHT = {
    "ink": "#1d2430",
    "soft": "#5b6676",
    "line": "#d5dbe3",
    "paper": "#ffffff",
    "panel": "#f5f7fa",
    "plan": "#1f5fd0",
    "other": "#0f8a6a",
    "store": "#8792a2",
    "budget": "#c62f3b",
    "kept": "#3d7de0",
    "again": "#e08a1e",
    "pinned": "#8a5cd1",
    "passing": "#c3cad4",
}
DARK = {
    "ink": "#e7ebf1",
    "soft": "#a3aebd",
    "line": "#39424f",
    "paper": "#12161c",
    "panel": "#1b212a",
    "plan": "#74a8ff",
    "other": "#4fd0a8",
    "store": "#8a95a5",
    "budget": "#ff7a82",
    "kept": "#5b93ee",
    "again": "#f0a648",
    "pinned": "#b18af0",
    "passing": "#4a5462",
}

STYLE = """
svg.picture{display:block;font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
svg.picture text{fill:var(--ink)} svg.picture text.soft{fill:var(--soft)}
svg.picture text.small{font-size:11px} svg.picture text.budget{fill:var(--budget)}
svg.picture text.store{fill:var(--soft)} svg.picture text.plan{fill:var(--plan)}
svg.picture text.other{fill:var(--other)}
svg.picture .grid{stroke:var(--line);stroke-width:1;shape-rendering:crispEdges}
svg.picture .band{fill:var(--panel)} svg.picture .frame{fill:none;stroke:var(--line)}
svg.picture .line{fill:none;stroke-width:1.6;stroke-linejoin:round}
svg.picture .area{opacity:.16;stroke:none}
svg.picture .s-plan{stroke:var(--plan)} svg.picture .f-plan{fill:var(--plan)}
svg.picture .s-other{stroke:var(--other)} svg.picture .f-other{fill:var(--other)}
svg.picture .s-store{stroke:var(--store)} svg.picture .f-store{fill:var(--store)}
svg.picture .s-budget{stroke:var(--budget);stroke-dasharray:6 4;stroke-width:1.4}
svg.picture .f-kept{fill:var(--kept)} svg.picture .f-again{fill:var(--again)}
svg.picture .f-pinned{fill:var(--pinned)} svg.picture .f-passing{fill:var(--passing)}
svg.picture .arc{fill:none;stroke:var(--soft);stroke-width:1;opacity:.55}
svg.picture .stay{opacity:.55} svg.picture .slice{fill:var(--ink);opacity:0}
svg.picture .slice:hover{opacity:.14} svg.picture .stay:hover,svg.picture .cell:hover{opacity:1;stroke:var(--ink)}
svg.picture .halo{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
"""


def variables(colours: dict[str, str]) -> str:
    """The colours as CSS declarations."""
    return ";".join(f"--{name}:{colour}" for name, colour in colours.items())


def tag(name: str, *children: str, title: str = "", **attributes: object) -> str:
    """One element. Attributes are escaped, `_` becomes `-`, `class_` is `class`; children are SVG already.

    >>> tag("rect", x=1.25, class_="cell", title="a < b")
    '<rect x="1.25" class="cell"><title>a &lt; b</title></rect>'
    """
    fields = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_short(value))}"' for key, value in attributes.items()
    )
    inside = (f"<title>{html.escape(title)}</title>" if title else "") + "".join(children)
    return f"<{name}{fields}>{inside}</{name}>" if inside else f"<{name}{fields}/>"


def text(x: float, y: float, content: str, *, class_: str = "", anchor: str = "start", title: str = "") -> str:
    """A line of text."""
    fields = {"class_": class_} if class_ else {}
    return tag("text", html.escape(content), title=title, x=x, y=y, text_anchor=anchor, **fields)


def picture(width: float, height: float, parts: Iterable[str], label: str) -> str:
    """The whole picture, drawn at its natural size and never larger than its place."""
    body = "\n".join(parts)
    size = f'width="{_short(width)}" height="{_short(height)}" viewBox="0 0 {_short(width)} {_short(height)}"'
    name = html.escape(label)
    return f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" role="img" aria-label="{name}" {size}>{body}</svg>'


def standalone(drawing: str) -> str:
    """A picture for a file of its own: with its style, in the theme of whoever looks at it."""
    dark = f"@media (prefers-color-scheme: dark){{svg.picture{{{variables(DARK)}}}}}"
    style = f"<style>svg.picture{{{variables(LIGHT)}}}{dark}{STYLE}</style>"
    backdrop = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    head, body = drawing.split(">", 1)
    return f"{head}>{style}{backdrop}{body}\n"


@dataclass(frozen=True)
class Scale:
    """Maps `low` … `high` of a quantity to `start` … `end` of the picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, amount: float) -> float:
        """The place of an amount."""
        span = self.high - self.low
        return self.start + (self.end - self.start) * ((amount - self.low) / span if span else 0.0)


def ticks(low: float, high: float, count: int, *, base: float = 10.0) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them; `base` 2 gives sizes that bytes are read in.

    >>> ticks(0.0, 11.0, 4)
    [0.0, 5.0, 10.0]
    """
    span = high - low
    if span <= 0:
        return [low]
    power = base ** math.floor(math.log(span / count, base))
    steps = (1.0, 2.0, 5.0, 10.0) if base == 10.0 else (1.0, 2.0, 4.0)
    step = next((power * s for s in steps if span / (power * s) <= count), power * steps[-1])
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def byte_ticks(high: float, count: int, *, low: float = 0.0) -> list[tuple[float, str]]:
    """Ticks of an axis in bytes, with their labels."""
    marks = ticks(low, high, count, base=2.0)
    return [(mark, _brief(int(mark))) for mark in marks]


def second_ticks(high: float, count: int) -> list[tuple[float, str]]:
    """Ticks of an axis in seconds, with their labels."""
    return [(mark, format_seconds(mark) if mark else "0") for mark in ticks(0.0, high, count)]


def path(points: Sequence[tuple[float, float]]) -> str:
    """The `d` of a line through points."""
    return "M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points) if points else ""


def _brief(size_bytes: int) -> str:
    number, _, unit = format_bytes(size_bytes, short=True).partition(" ")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number} {unit}" if size_bytes else "0"


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
