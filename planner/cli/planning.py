"""The options that the planning verbs share: how they are written, and the arguments that they stand for.

`plan`, `pareto`, `minimum-budget` and `max-batch` take the same ones, as the functions behind them do.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from planner.errors import PlannerError

if TYPE_CHECKING:
    from planner.plan_file import Plan
    from solvers.solution import Solver


class _Extra(argparse.Action):
    """Collects `LABEL=SIZE` into a dict of bytes by label."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        from planner.budget import parse_budget
        from planner.errors import BudgetError

        label, equals, size = str(values).rpartition("=")
        try:
            size_bytes = parse_budget(size).size_bytes if equals and label else None
        except BudgetError as error:
            raise argparse.ArgumentError(self, str(error).replace("budget", "size", 1)) from error
        if size_bytes is None:
            raise argparse.ArgumentError(self, f"{values!r} is no LABEL=SIZE in bytes, such as headroom=512MiB")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), label: size_bytes})


def seconds(text: str) -> float:
    """The type of `--time-limit`: positive, finite seconds."""
    try:
        given = float(text)
    except ValueError:
        given = math.nan
    if not (math.isfinite(given) and given > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write seconds, such as 60")
    return given


def add_planning(verb: argparse.ArgumentParser, *, start: bool = True) -> None:
    """Give a verb the options that say what is planned for, at which prices, and by whom.

    **Arguments:**

    - `start`: whether the verb can start from a plan, which is of one step alone.
    """
    verb.add_argument("--solver", metavar="NAME", help="see `checkpoint-planner solvers`; by default one is chosen")
    verb.add_argument("--device", metavar="NAME", default="cpu", help="the device to plan for (default: cpu)")
    verb.add_argument("--time-limit", metavar="SECONDS", type=seconds, help="how long the solver may search")
    verb.add_argument(
        "--no-gradient-accumulation",
        dest="gradient_accumulation",
        action="store_false",
        help="plan for one micro-batch per optimizer step only",
    )
    verb.add_argument(
        "--costs",
        choices=("roofline", "measured", "flops"),
        default="roofline",
        help="where the operators' seconds come from: a roofline of the device, measured on it, or FLOPs alone",
    )
    verb.add_argument(
        "--compiler",
        choices=("eager", "inductor"),
        default="eager",
        help="whose kernels will run the step: torch's own, or Inductor's, which fuse pointwise operators",
    )
    verb.add_argument(
        "--extra",
        action=_Extra,
        default={},
        metavar="LABEL=SIZE",
        help='memory beside the step that the budget covers, too, such as "optimizer state=2GiB" or "headroom=512MiB"; '
        "may be given several times",
    )
    for name, what in (("keep", "held until their last use"), ("recompute", "recomputed in the backward pass")):
        verb.add_argument(
            f"--{name}",
            nargs="+",
            action="extend",
            default=[],
            metavar="MODULE",
            help=f'modules whose values are {what}, by name or pattern ("h.*.attn")',
        )
    if start:
        verb.add_argument("--start", metavar="PLAN", help="an earlier plan of the same step, to start the search from")


def planning_arguments(options: argparse.Namespace, *, default_seconds: float | None = None) -> dict[str, Any]:
    """What :func:`add_planning`'s options stand for: keyword arguments of `plan`, `pareto` and their like.

    **Arguments:**

    - `default_seconds`: the time limit where none was given.

    Raises :class:`~planner.errors.PlannerError` for what is wrong, before a model is made.
    """
    arguments = {
        "device": _device(options.device),
        "solver": _solver(options),
        "time_limit_seconds": default_seconds if options.time_limit is None else options.time_limit,
        "gradient_accumulation": options.gradient_accumulation,
        "extra_bytes": options.extra,
        "costs": options.costs,
        "compiler": options.compiler,
        "keep": options.keep,
        "recompute": options.recompute,
    }
    if "start" in options:
        arguments["start"] = _start(options.start)
    return arguments


def is_plan(options: argparse.Namespace) -> bool:
    """Whether the target is a plan file and not a factory.

    Raises :class:`~planner.errors.PlannerError` where a plan is given together with what it has settled already.
    """
    if not options.target.endswith(".json"):
        return False
    settled = options.keep or options.recompute or options.extra
    if settled or options.costs != "roofline" or options.compiler != "eager":
        raise PlannerError(
            f"{options.target} is a plan, whose pins and prices are settled: --keep, --recompute, --extra, --costs and "
            "--compiler go with FILE_OR_MODULE:FACTORY"
        )
    return True


def _start(path: str | None) -> Plan | None:
    from planner.plan_file import Plan

    return None if path is None else Plan.load(path)


def _solver(options: argparse.Namespace) -> Solver | None:
    from solvers.registry import solver_class

    return solver_class(options.solver)() if options.solver else None


def _device(name: str) -> str:
    from graph_capture.devices import device_by_name

    if name == "cuda":  # the card at hand: which one it is, capturing finds out
        return name
    try:
        return device_by_name(name).name
    except ValueError as error:
        raise PlannerError(str(error)) from error
