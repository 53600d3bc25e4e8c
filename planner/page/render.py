"""Fills the templates: one file that opens offline, in a light and a dark theme, without any script.

Every name is escaped, in the page by jinja2 and in the drawings by :mod:`planner.pictures.svg`. A policy in the page
forbids the browser to load anything, were a name ever to slip through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from planner._version import __version__
from planner.pictures.svg import DARK, LIGHT, STYLE, variables

WIDE, NARROW = 1070, 360
"""Widths in CSS pixels at which figures are drawn, for a laptop's screen and for a telephone's."""


@dataclass(frozen=True)
class Figure:
    """One drawing at both widths; the page shows the one that fits."""

    wide: Markup
    narrow: Markup

    @classmethod
    def of(cls, draw: Callable[[int], str]) -> Figure:
        """Draw at both widths."""
        return cls(Markup(draw(WIDE)), Markup(draw(NARROW)))


def render(template: str, **fields: Any) -> str:
    """The page as text."""
    common: dict[str, Any] = {
        "light": Markup(variables(LIGHT)),
        "dark": Markup(variables(DARK)),
        "style": Markup(STYLE),
        "footer": f"checkpoint-planner {__version__}",
    }
    return _environment().get_template(template).render(**common, **fields)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("planner", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
