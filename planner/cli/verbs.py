"""The verbs of the command line; each takes the parsed options and returns the exit code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli.main import CHECK_FAILED, OK
from planner.cli.paths import check_output
from planner.cli.planning import planning_arguments
from planner.errors import CertificateError, NoScheduleError

if TYPE_CHECKING:
    from planner.certificate.verify import CertificateReport
    from planner.plan_file import Plan


def plan(options: argparse.Namespace) -> int:
    """Make a plan, print it, and write it if a path was given."""
    from planner.budget import parse_budget
    from planner.cli.factory import make
    from planner.cli.progress import CAPTURING, progress_on

    # Whatever can be wrong is looked at before the minutes that a solver may take.
    budget = parse_budget(options.budget)
    check_output(options.output, "the plan")
    arguments = planning_arguments(options)
    from planner.api import plan as make_plan

    made = make(options.target)
    try:
        with progress_on(sys.stderr, CAPTURING) as listener:
            planned = make_plan(
                made.model,
                budget,
                made.args,
                made.kwargs,
                loss_fn=made.loss_fn,
                **arguments,
                progress=listener,
            )
    except NoScheduleError as error:
        if options.json:
            _print_json(_no_schedule(error))
        raise
    if options.output:
        planned.save(options.output)
    if options.json:
        _print_json({**_summary(planned), "output": options.output})
        return OK
    print(planned)
    if options.output:
        print(f"\nwritten to {options.output}; `checkpoint-planner show {options.output} --html report.html` draws it")
    return OK


def show(options: argparse.Namespace) -> int:
    """Print a plan, its decisions by module, and what fills its peak."""
    from planner.cli import pictures

    pictures.check_paths(options)
    from planner.plan_file import Plan
    from planner.report import report_on

    planned = Plan.load(options.plan)
    if options.json:
        _print_json({**_summary(planned), "report": dataclasses.asdict(report_on(planned))})
    else:
        print(planned)
    pictures.of_plan(options, planned)
    return OK


def compare(options: argparse.Namespace) -> int:
    """Print two plans side by side."""
    from planner.cli import pictures

    pictures.check_paths(options)
    from planner.plan_file import Plan
    from planner.report.comparison import compare as compare_plans
    from planner.report.text import comparison_text

    first, second = Plan.load(options.first), Plan.load(options.second)
    comparison = compare_plans(first, second)
    if options.json:
        plans = {"first": _summary(first), "second": _summary(second)}
        _print_json({**plans, "comparison": dataclasses.asdict(comparison)})
    else:
        print(comparison_text(comparison))
    pictures.of_two(options, first, second)
    return OK


def pareto(options: argparse.Namespace) -> int:
    """Solve several budgets, and print the curve."""
    from planner.cli import pictures

    pictures.check_paths(options)
    from planner.cli.curve import curve_data, curve_text, solve_curve

    curve = solve_curve(options)
    if options.json:
        _print_json(curve_data(curve))
    else:
        print(curve_text(curve))
    pictures.of_curve(options, curve)
    return OK


def minimum_budget(options: argparse.Namespace) -> int:
    """Look for the smallest budget that works."""
    from planner.cli.questions import minimum_data, solve_minimum

    found = solve_minimum(options)
    if options.json:
        _print_json(minimum_data(found))
    else:
        print(found)
    return OK


def max_batch(options: argparse.Namespace) -> int:
    """Look for the largest batch that fits."""
    from planner.cli.questions import batch_data, solve_batch

    try:
        found = solve_batch(options)
    except NoScheduleError as error:
        if options.json:
            _print_json(_no_schedule(error))
        raise
    if options.output:
        found.plan.save(options.output)
    if options.json:
        _print_json({**batch_data(found), "output": options.output})
        return OK
    print(found)
    if options.output:
        print(f"\nthe plan of that batch is written to {options.output}")
    return OK


def certify(options: argparse.Namespace) -> int:
    """Write the certificate of a plan."""
    check_output(options.output, "the certificate")
    from planner.certificate.make import export_certificate
    from planner.cli.progress import progress_on
    from planner.plan_file import Plan

    planned = Plan.load(options.plan)
    with progress_on(sys.stderr) as listener:
        report = export_certificate(planned, options.output, time_limit_seconds=options.time_limit, progress=listener)
    if options.json:
        _print_json({**_report_data(report), "output": options.output})
    else:
        print(f"{report}\n\nwritten to {options.output}; `checkpoint-planner verify {options.output}` checks it")
    return OK


def verify(options: argparse.Namespace) -> int:
    """Check a certificate; what it does not prove is a failed check."""
    from planner.certificate.verify import verify_certificate

    try:
        report = verify_certificate(options.certificate)
    except CertificateError as error:
        if options.json:
            _print_json({"valid": False, "message": str(error)})
        else:
            print(f"not valid: {error}")
        return CHECK_FAILED
    if options.json:
        _print_json({"valid": True, **_report_data(report)})
    else:
        print(report)
    return OK


def check(options: argparse.Namespace) -> int:
    """Run one step with and without a plan, and compare."""
    from planner.plan_file import Plan

    planned = Plan.load(options.plan)  # before torch is loaded: a damaged file is said at once
    from planner.checking import check_plan
    from planner.cli.factory import make
    from planner.cli.progress import progress_on

    made = make(options.target)
    with progress_on(sys.stderr, "running a step without the plan, and one with it"):
        report = check_plan(planned, made.model, made.args, made.kwargs, made.loss_fn)
    if options.json:
        _print_json({"passed": report.passed, "results": [dataclasses.asdict(result) for result in report.results]})
    else:
        print(report)
    return OK if report.passed else CHECK_FAILED


def export(options: argparse.Namespace) -> int:
    """Turn a plan into a policy of selective checkpointing, print what it costs, and write it if a path was given."""
    check_output(options.output, "the policy")
    from planner.plan_file import Plan

    planned = Plan.load(options.plan)
    from planner.cli.factory import make
    from planner.cli.progress import progress_on
    from planner.export.make import export_policy

    made = make(options.target)
    with progress_on(sys.stderr, "looking for the best policy of whole blocks"):
        policy = export_policy(
            planned,
            made.model,
            made.args,
            made.kwargs,
            loss_fn=made.loss_fn,
            blocks=options.blocks,
            budget=options.budget,
        )
    if options.output and options.form == "policy":
        policy.save(options.output)
    elif options.output:
        Path(options.output).write_text(json.dumps(policy.decisions(), indent=1) + "\n", encoding="utf-8")
    if options.json:
        _print_json(policy.decisions() if options.form == "torchtitan" else policy.model_dump(mode="json"))
    else:
        print(policy)
    return OK


def solvers(options: argparse.Namespace) -> int:
    """List the solvers."""
    from planner.report.text import columns
    from solvers.registry import SOLVERS

    rows = [(entry.name, entry.search_class.value, entry.description) for entry in SOLVERS.values()]
    if options.json:
        _print_json([dict(zip(("name", "search_class", "description"), row, strict=True)) for row in rows])
    else:
        print(columns([("solver", "searches", "what it is"), *((n, c.split(":")[0], d) for n, c, d in rows)]))
    return OK


def _summary(planned: Plan) -> dict[str, Any]:
    """The plan without its graph, schedule and parameter list, which are for programs that read the file."""
    data = planned.model_dump(mode="json", exclude={"graph", "schedule"})
    del data["model"]["parameters"]
    return data


def _no_schedule(error: NoScheduleError) -> dict[str, Any]:
    return {
        "status": error.solution.status.name if error.solution else None,
        "message": str(error),
        "smallest_known_budget_bytes": error.smallest_known_budget_bytes,
        "floor_operator": error.floor_operator,
    }


def _report_data(report: CertificateReport) -> dict[str, Any]:
    """What a certificate proves, for JSON: what is infinite (a bound where nothing fits) is the text `inf`."""
    rows = {**dataclasses.asdict(report), "bound": report.bound, "gap": report.gap}
    return {name: "inf" if item == math.inf else item for name, item in rows.items()}


def _print_json(data: object) -> None:
    json.dump(data, sys.stdout, indent=2, allow_nan=False)
    print()
