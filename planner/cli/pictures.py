"""`--plot` and `--html`: what is written beside the tables. What draws is imported only if it is asked for."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli.paths import check_output
from planner.cli.progress import DRAWING, progress_on

if TYPE_CHECKING:
    from planner.cli.curve import Curve
    from planner.plan_file import Plan


def check_paths(options: argparse.Namespace) -> None:
    """Refuse what cannot be written before anything is computed."""
    check_output(options.plot, "the plot")
    check_output(options.html, "the report")
    if options.plot:
        from planner.pictures.plots import check_plot_path

        check_plot_path(options.plot)


def of_plan(options: argparse.Namespace, plan: Plan) -> None:
    """The pictures of one plan."""
    with _drawing(options):
        if options.html:
            from planner.page import plan_page

            _write(options.html, plan_page(plan))
        if options.plot:
            from planner.pictures.of_plan import curve_of_plan, memory_of_plan, title_of
            from planner.pictures.plots import save_plot

            save_plot(options.plot, title_of(plan), memory_of_plan(plan), curve_of_plan(plan))


def of_two(options: argparse.Namespace, first: Plan, second: Plan) -> None:
    """The pictures of two plans."""
    names = Path(options.first).name, Path(options.second).name
    with _drawing(options):
        if options.html:
            from planner.page import comparison_page

            _write(options.html, comparison_page(first, second, names))
        if options.plot:
            from planner.pictures.of_plan import curve_of_two, memory_of_two
            from planner.pictures.plots import save_plot

            title = f"a: {names[0]}, b: {names[1]}"
            save_plot(options.plot, title, memory_of_two(first, second), curve_of_two(first, second))


def of_curve(options: argparse.Namespace, curve: Curve) -> None:
    """The pictures of a curve of budgets."""
    if not (options.html or options.plot):
        return
    with _drawing(options):
        points, others = curve.points(), curve.references
        if options.html:
            from planner.page import curve_page

            _write(options.html, curve_page(curve.name, curve.eager_peak_bytes, points, others))
        if options.plot:
            from planner.pictures.curve import CurvePicture
            from planner.pictures.plots import save_plot

            save_plot(options.plot, f"{curve.name}: overhead against memory", None, CurvePicture(others, points))


def _drawing(options: argparse.Namespace) -> AbstractContextManager[object]:
    """Says that pictures are drawn while they are: a second or more for thousands of operators."""
    wanted = options.html or options.plot
    return progress_on(sys.stderr, DRAWING) if wanted else nullcontext()


def _write(path: str, page: str) -> None:
    Path(path).write_text(page, encoding="utf-8")
