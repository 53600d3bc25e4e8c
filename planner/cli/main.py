"""The command line: arguments in, exit code out.

| code | meaning                                                                            |
| ---- | ---------------------------------------------------------------------------------- |
| 0    | done                                                                               |
| 1    | an error: one line on stderr, with `--traceback` the whole of it                   |
| 2    | the budget is infeasible, and that is proven                                       |
| 3    | `check` or `verify` found something that does not hold                             |

Nothing is imported before a verb needs it: `--help` loads neither torch nor a solver nor pydantic, `show` and `compare`
no torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from planner._version import __version__
from planner.cli.planning import add_planning, seconds

OK, ERROR, INFEASIBLE, CHECK_FAILED = 0, 1, 2, 3
INTERRUPTED = 130

_TARGET_HELP = (
    "a .py file or an importable module, and a function in it that returns (model, example_inputs), "
    "(model, args, kwargs) or (model, args, kwargs, loss_fn)"
)


class _Parser(argparse.ArgumentParser):
    """argparse ends with 2 for a wrong argument, which here means that a budget is infeasible."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ERROR, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(
        prog="checkpoint-planner",
        description="Plans which activations of a PyTorch training step to keep and which to recompute, "
        "so that the step fits a memory budget.",
        epilog="Exit codes: 0 done, 1 error, 2 the budget is proven infeasible, 3 a check failed.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON in the place of tables")
    common.add_argument("--traceback", action="store_true", help="show where an error comes from")

    plan = verbs.add_parser("plan", parents=[common], help="make a plan for a model and a budget")
    plan.add_argument("target", metavar="FILE_OR_MODULE:FACTORY", help=_TARGET_HELP)
    plan.add_argument(
        "--budget", required=True, help='bytes with a unit ("12GiB") or percent of eager\'s peak ("60%%")'
    )
    plan.add_argument("-o", "--output", metavar="PLAN", help="where to write the plan; without it, it is only shown")
    add_planning(plan)

    show = verbs.add_parser("show", parents=[common], help="what a plan decided, by module, and what fills its peak")
    show.add_argument("plan", metavar="PLAN", help="a plan file")

    _pictures(show)

    compare = verbs.add_parser("compare", parents=[common], help="two plans side by side")
    compare.add_argument("first", metavar="A", help="a plan file")
    compare.add_argument("second", metavar="B", help="another plan file")
    _pictures(compare)

    pareto = verbs.add_parser("pareto", parents=[common], help="overhead against budget, with a lower bound beside it")
    pareto.add_argument(
        "target", metavar="PLAN_OR_FACTORY", help=f"a plan file, whose graph is used, or {_TARGET_HELP}"
    )
    pareto.add_argument(
        "--budgets",
        nargs="+",
        metavar="BUDGET",
        default=["90%", "80%", "70%", "60%", "50%", "40%"],
        help="each as for `plan` (default: 90%% to 40%% of eager's peak)",
    )
    add_planning(pareto)
    _pictures(pareto)

    check = verbs.add_parser("check", parents=[common], help="run one step with and without a plan, and compare")
    check.add_argument("plan", metavar="PLAN", help="a plan file")
    check.add_argument("target", metavar="FILE_OR_MODULE:FACTORY", help=_TARGET_HELP)

    _questions(verbs.add_parser, common)
    _certificates(verbs.add_parser, common)
    _exports(verbs.add_parser, common)
    verbs.add_parser("solvers", parents=[common], help="the solvers that there are")
    return parser


def _questions(add_verb: Callable[..., argparse.ArgumentParser], common: _Parser) -> None:
    smallest = add_verb(
        "minimum-budget", parents=[common], help="the smallest budget that works, with a bound below it"
    )
    smallest.add_argument(
        "target", metavar="PLAN_OR_FACTORY", help=f"a plan file, whose graph is used, or {_TARGET_HELP}"
    )
    add_planning(smallest)

    batch = add_verb("max-batch", parents=[common], help="the largest batch that fits, with its plan")
    batch.add_argument(
        "target",
        metavar="FILE_OR_MODULE:FACTORY",
        help="a function that returns (model, make_inputs) or (model, make_inputs, loss_fn); make_inputs(batch) "
        "returns what the model is called with",
    )
    batch.add_argument("--budget", required=True, help='bytes with a unit ("12GiB")')
    batch.add_argument("-o", "--output", metavar="PLAN", help="where to write the plan of that batch")
    batch.add_argument("--max-overhead", metavar="PERCENT", type=float, help="the most that a step may take longer")
    batch.add_argument("--multiple-of", metavar="N", type=int, default=1, help="try multiples of N only (default: 1)")
    batch.add_argument("--limit", metavar="N", type=int, help="try no larger batch (default: 65536)")
    batch.add_argument(
        "--prefer",
        choices=("largest", "fastest"),
        default="largest",
        help="the largest batch, or the one with the most samples per second by the cost model",
    )
    add_planning(batch, start=False)


def _exports(add_verb: Callable[..., argparse.ArgumentParser], common: _Parser) -> None:
    export = add_verb(
        "export", parents=[common], help="a plan as a policy of torch.utils.checkpoint, block by block, and its price"
    )
    export.add_argument("plan", metavar="PLAN", help="a plan file")
    export.add_argument("target", metavar="FILE_OR_MODULE:FACTORY", help=_TARGET_HELP)
    export.add_argument(
        "-o", "--output", metavar="FILE", help="where to write the policy; without it, it is only shown"
    )
    export.add_argument(
        "--as",
        dest="form",
        choices=("policy", "torchtitan"),
        default="policy",
        help="the policy with everything about it (default), or the bare decision of each block, for a trainer that "
        "wraps blocks by itself",
    )
    export.add_argument("--budget", help="another budget than the plan's")
    export.add_argument("--blocks", nargs="+", metavar="MODULE", help="the modules that may be checkpointed")


def _certificates(add_verb: Callable[..., argparse.ArgumentParser], common: _Parser) -> None:
    certify = add_verb("certify", parents=[common], help="write what proves a plan's bound, for others to check")
    certify.add_argument("plan", metavar="PLAN", help="a plan file")
    certify.add_argument("-o", "--output", metavar="CERTIFICATE", required=True, help="where to write the certificate")
    certify.add_argument(
        "--time-limit", metavar="SECONDS", type=seconds, default=60.0, help="for the search of a proof (default: 60)"
    )

    verify = add_verb("verify", parents=[common], help="check a certificate in exact arithmetic, without solvers")
    verify.add_argument("certificate", metavar="CERTIFICATE", help="a certificate file")


def _pictures(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--plot", metavar="FILE", help="also draw memory and trade-off to a .png, .svg or .pdf file")
    verb.add_argument("--html", metavar="FILE", help="also write a report that a browser opens offline")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        sys.stderr.write("checkpoint-planner: interrupted; nothing was written\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone (`| head`). Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except Exception as error:  # the boundary to the user: reported, and turned into an exit code
        if options.traceback:
            traceback.print_exc()
        return _report(error)


def _run(options: argparse.Namespace) -> int:
    from planner.cli import verbs

    code: int = getattr(verbs, options.verb.replace("-", "_"))(options)
    sys.stdout.flush()
    return code


def _report(error: Exception) -> int:
    from planner.errors import CaptureError, InfeasibleBudgetError, PlannerError
    from solvers.backends import BackendError
    from solvers.registry import UnknownSolverError

    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, (PlannerError, CaptureError, BackendError, UnknownSolverError, OSError)):
        text = f"{type(error).__name__}: {text} (--traceback shows where)"
    sys.stderr.write(f"checkpoint-planner: {text}\n")
    return INFEASIBLE if isinstance(error, InfeasibleBudgetError) else ERROR
