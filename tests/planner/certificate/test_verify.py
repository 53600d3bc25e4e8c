"""Certificates from end to end: their bounds are true, and a certificate that lies in any field is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graph_capture.graph import Graph
from planner.certificate.make import Certificate, certify, export_certificate
from planner.certificate.statement import CLAIMS, FIELDS, checksum
from planner.certificate.verify import verify_certificate
from planner.errors import CertificateError
from planner.plan_file import Plan
from solvers import Checkmate, SnapshotRefinement
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.solution import Solution, Status, memory_floor
from tests.planner.certificate.test_relaxation import FAMILIES
from tests.planner.plans import plan_fields
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import random_graph, training_chain

LIMITS: dict[str, Any] = {"time_limit_seconds": 60.0, "leaf_limit": 60}


def exact_solution(graph: Graph, budget_bytes: int) -> Solution:
    """The optimum of the class as a solution, infeasible where it is."""
    overhead, (_, schedule) = BruteForce(graph).overhead(budget_bytes), BruteForce(graph).optimum(budget_bytes)
    template = Checkmate().solve(training_chain(3), 10**6)
    status = Status.INFEASIBLE if schedule is None else Status.OPTIMAL
    return dataclasses.replace(
        template, schedule=schedule, status=status, overhead=overhead, lower_bound=overhead, solver="exhaustive search"
    )


@pytest.mark.parametrize("family", range(len(FAMILIES)))
def test_bounds_are_true(family: int) -> None:
    """The verifier's bounds never exceed the optimum; and the verifier itself refuses a schedule that beats a bound."""
    features, joint = FAMILIES[family]
    for seed in range(4):
        graph = random_graph(seed, 4 if joint else 6, features, joint)
        peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
        budget_bytes = (2 * memory_floor(graph)[0] + peak_bytes) // 3
        solution = exact_solution(graph, budget_bytes)
        if solution.schedule is None:
            continue
        report = certify(graph, budget_bytes, solution, **LIMITS).report
        assert 0.0 <= report.bound <= solution.overhead + 1e-12
        assert report.linear_bound <= report.bound
        assert report.overhead == pytest.approx(solution.overhead)
        assert report.peak_bytes is not None
        assert report.peak_bytes <= budget_bytes


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    """A schedule of a chain with a branch tree: the linear bound alone does not reach the optimum."""
    graph = training_chain(12)
    operators = tuple(
        dataclasses.replace(o, seconds=o.seconds + 0.37 * (i * i % 7)) for i, o in enumerate(graph.operators)
    )
    values = tuple(dataclasses.replace(v, size_bytes=v.size_bytes + i * i % 5) for i, v in enumerate(graph.values))
    graph = dataclasses.replace(graph, operators=operators, values=values)
    solution = SnapshotRefinement(work_limit=3).solve(graph, 75)
    made = certify(graph, 75, solution, cut_rounds=1, **LIMITS)
    assert made.report.leaves > 1
    assert made.report.cuts > 0
    return made


def test_the_tree_proves_more(certificate: Certificate) -> None:
    report = certificate.report
    assert report.integer_bound is not None
    assert report.linear_bound < report.integer_bound
    assert report.overhead is not None
    assert report.integer_bound <= report.overhead
    assert report.solver_bound_checked == (report.bound >= report.solver_bound)
    assert "legal, within the budget" in str(report)


def test_file_round_trip(certificate: Certificate, tmp_path: Path) -> None:
    certificate.save(tmp_path / "c.json")
    assert verify_certificate(tmp_path / "c.json") == certificate.report
    assert verify_certificate(certificate.data) == certificate.report


def test_the_verifier_needs_neither_solver_nor_library(certificate: Certificate, tmp_path: Path) -> None:
    certificate.save(tmp_path / "c.json")
    code = (
        "import sys; from planner import verify_certificate; print(verify_certificate(sys.argv[1]).leaves); "
        "heads = {m.split('.')[0] for m in sys.modules}; "
        "print(sorted(heads & {'solvers', 'ortools', 'numpy', 'torch', 'pydantic', 'numba', 'networkx'}))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c.json")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    assert output[:2] == [str(certificate.report.leaves), "[]"]


def test_infeasible_budgets_are_certified() -> None:
    """By a position that needs too much, and by rows that cannot hold together."""
    graph = training_chain(8)
    floor_bytes = memory_floor(graph)[0]
    for budget_bytes in (floor_bytes - 1, floor_bytes):
        solution = exact_solution(graph, budget_bytes)
        if solution.status is not Status.INFEASIBLE:
            continue
        report = certify(graph, budget_bytes, solution, **LIMITS).report
        assert report.bound == math.inf
        assert report.overhead is None


def test_a_wrong_claim_of_infeasibility_is_not_certified() -> None:
    graph = training_chain(6)
    budget_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes - 10
    wrong = dataclasses.replace(exact_solution(graph, budget_bytes), schedule=None, status=Status.INFEASIBLE)
    with pytest.raises(CertificateError, match="was not proven"):
        certify(graph, budget_bytes, wrong, **LIMITS)


def test_nothing_to_certify() -> None:
    unknown = dataclasses.replace(exact_solution(training_chain(3), 100), schedule=None, status=Status.UNKNOWN)
    with pytest.raises(CertificateError, match="nothing to certify"):
        certify(training_chain(3), 100, unknown)


def test_plans_are_exported(tmp_path: Path) -> None:
    plan = Plan(**plan_fields())
    report = export_certificate(plan, tmp_path / "plan.certificate.json")
    assert verify_certificate(tmp_path / "plan.certificate.json") == report
    assert report.overhead == pytest.approx(plan.overhead)
    assert report.peak_bytes == plan.predicted_peak_bytes


# -------------------------------------------------------------------- tampering


def tampered(certificate: Certificate, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A certificate changed by someone who knows how to make the checksum."""
    data = copy.deepcopy(dict(certificate.data))
    change(data)
    data["checksum"] = checksum(data)
    return data


def raise_bound(name: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["claims"][name] += 1e-6

    return change


def set_claim(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["claims"][name] = value

    return change


def set_field(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data[name] = value

    return change


def drop_last_step(data: dict[str, Any]) -> None:
    while data["schedule"][-1] < 0:  # frees at the end are no loss
        del data["schedule"][-1]
    del data["schedule"][-1]


def drop_a_rerun(data: dict[str, Any]) -> None:
    again = next(i for i, row in enumerate(data["schedule"]) if row in data["schedule"][:i])
    del data["schedule"][again]


def enlarge_a_value(data: dict[str, Any]) -> None:
    data["graph"]["values"][0]["size_bytes"] += 1000


def reprice(data: dict[str, Any]) -> None:
    data["graph"]["operators"][0]["seconds"] += 1.0


def negative_price(data: dict[str, Any]) -> None:
    data["graph"]["operators"][0]["seconds"] = -1.0


def shrink_a_multiplier(data: dict[str, Any]) -> None:
    data["linear"]["multipliers"][0][1] -= 1 << 20


def negate_a_multiplier(data: dict[str, Any]) -> None:
    data["linear"]["multipliers"][0][1] *= -1


def multiplier_of_no_row(data: dict[str, Any]) -> None:
    data["linear"]["multipliers"][0][0] = 10**6


def huge_exponent(data: dict[str, Any]) -> None:
    data["linear"]["multipliers"][0][2] = 10**9


def shrink_a_leaf(data: dict[str, Any]) -> None:
    for node in data["tree"]:
        for multiplier in node.get("multipliers", ()):
            multiplier[1] //= 2


def claim_infeasible(data: dict[str, Any]) -> None:
    for node in data["tree"]:
        if "multipliers" in node:
            node["infeasible"] = True


def rename_a_row(data: dict[str, Any]) -> None:
    data["rows"][0] = ["memory", 10**6]


def invent_a_row(data: dict[str, Any]) -> None:
    data["rows"][0] = ["trust", 1, 2]


def weigh_a_cut_down(data: dict[str, Any]) -> None:
    data["cuts"][0]["combine"][0][1] = -1


def let_a_cut_use_itself(data: dict[str, Any]) -> None:
    data["cuts"][0]["combine"][0][0] = len(data["rows"])


def change_a_divisor(data: dict[str, Any]) -> None:
    data["cuts"][0]["divisor"] = 0


def round_nothing(data: dict[str, Any]) -> None:
    data["cuts"][0]["divisor"] = 1


def let_the_linear_bound_use_a_cut(data: dict[str, Any]) -> None:
    data["linear"]["multipliers"].append([len(data["rows"]), 1, 0])


def drop_a_branch(data: dict[str, Any]) -> None:
    data["tree"][0]["one"] = data["tree"][0]["zero"]


def orphan_a_node(data: dict[str, Any]) -> None:
    data["tree"].append({"multipliers": [], "infeasible": False})


def split_at_no_column(data: dict[str, Any]) -> None:
    data["tree"][0]["column"] = ["r", 0, 10**6]


def split_twice(data: dict[str, Any]) -> None:
    child = data["tree"][0]["zero"]
    data["tree"] += [{"multipliers": [], "infeasible": False}] * 2
    n = len(data["tree"])
    data["tree"][child] = {"column": data["tree"][0]["column"], "zero": n - 2, "one": n - 1}


TAMPERING: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "format": (set_field("format", "plan"), "this is no certificate"),
    "schema_version": (set_field("schema_version", "2.0"), "cannot be read by this version"),
    "graph, a size": (enlarge_a_value, "peak is .* the budget"),
    "graph, a price": (reprice, "states .* as its (recomputed_seconds|step_seconds)"),
    "graph, a negative price": (negative_price, "graph cannot be rebuilt"),
    "budget_bytes, less": (set_field("budget_bytes", 20), "peak is .* the budget"),
    "budget_bytes, more": (set_field("budget_bytes", 76), "linear_bound"),
    "budget_bytes, no integer": (set_field("budget_bytes", 75.0), "where an integer belongs"),
    "schedule, cut off": (drop_last_step, "missing at the end|never runs"),
    "schedule, a repetition left out": (drop_a_rerun, "not in memory"),
    "schedule, none": (set_field("schedule", None), "recomputed_seconds"),
    "claims, a field more": (set_claim("trust", "me"), "unknown field 'trust'"),
    "scope": (set_claim("scope", "every schedule, in any order"), "as its scope"),
    "step_seconds": (set_claim("step_seconds", "1/1"), "as its step_seconds"),
    "recomputed_seconds": (set_claim("recomputed_seconds", "0"), "as its recomputed_seconds"),
    "overhead": (set_claim("overhead", 0.0), "as its overhead"),
    "peak_bytes": (set_claim("peak_bytes", 1), "as its peak_bytes"),
    "first_peak_bytes": (set_claim("first_peak_bytes", 1), "as its first_peak_bytes"),
    "later_peak_bytes": (set_claim("later_peak_bytes", 1), "as its later_peak_bytes"),
    "linear_bound": (raise_bound("linear_bound"), "as its linear_bound"),
    "integer_bound": (raise_bound("integer_bound"), "as its integer_bound"),
    "integer_bound, none": (set_claim("integer_bound", None), "as its integer_bound"),
    "integer_bound, infinite": (set_claim("integer_bound", "inf"), "as its integer_bound"),
    "leaves": (set_claim("leaves", 1), "as its leaves"),
    "solver": (set_claim("solver", 3), "claim 'solver' is 3, not a text"),
    "solver_scope": (set_claim("solver_scope", None), "claim 'solver_scope' is None, not a text"),
    "solver_bound": (set_claim("solver_bound", "much"), "claim 'solver_bound' is 'much'"),
    "instants": (set_field("instants", [0]), "the relaxation does not have|linear_bound"),
    "instants, not from 0": (set_field("instants", [3]), "relaxation cannot be rebuilt"),
    "smallest_modelled_bytes": (set_field("smallest_modelled_bytes", 10**9), "the relaxation does not have"),
    "rows, no such operator": (rename_a_row, "there is no such operator"),
    "rows, no such kind": (invent_a_row, "is not the name of a row"),
    "cuts, a negative weight": (weigh_a_cut_down, "cut that does not follow: .* with weight -1"),
    "cuts, in a circle": (let_a_cut_use_itself, "cut that does not follow: a cut combines row"),
    "cuts, no divisor": (change_a_divisor, "cut that does not follow: a cut divides by 0"),
    "cuts, nothing to round": (round_nothing, "cut that does not follow: .* nothing to round"),
    "cuts, none": (set_field("cuts", []), "a multiplier for row"),
    "linear, a cut": (let_the_linear_bound_use_a_cut, "a multiplier for row"),
    "linear, a multiplier": (shrink_a_multiplier, "as its linear_bound"),
    "linear, a negative multiplier": (negate_a_multiplier, "negative multiplier"),
    "linear, a row": (multiplier_of_no_row, "a multiplier for row 1000000"),
    "linear, an exponent": (huge_exponent, "exponent 1000000000, beyond"),
    "tree, multipliers": (shrink_a_leaf, "as its integer_bound"),
    "tree, infeasible": (claim_infeasible, "as its integer_bound"),
    "tree, a branch left out": (drop_a_branch, "refers to node .* twice"),
    "tree, a node too many": (orphan_a_node, "belongs to no branch"),
    "tree, a column": (split_at_no_column, "which is no column|where a column belongs"),
    "tree, a column twice": (split_twice, "splits twice at"),
    "tree, none": (set_field("tree", []), "as its integer_bound"),
    "tree, no list": (set_field("tree", 5), "tree is 5, not a list"),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_is_refused(certificate: Certificate, name: str) -> None:
    change, message = TAMPERING[name]
    with pytest.raises(CertificateError, match=message):
        verify_certificate(tampered(certificate, change))


def test_every_field_is_tampered_with() -> None:
    covered = {name.split(",")[0] for name in TAMPERING}
    assert set(FIELDS) | set(CLAIMS) == covered | {"checksum"}


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_refused(certificate: Certificate, name: str) -> None:
    data = copy.deepcopy(dict(certificate.data))
    del data[name]
    with pytest.raises(CertificateError):
        verify_certificate(data)


def test_an_edit_by_hand_is_noticed(certificate: Certificate) -> None:
    data = copy.deepcopy(dict(certificate.data))
    data["claims"]["solver_bound"] = 0.0
    with pytest.raises(CertificateError, match="checksum does not match"):
        verify_certificate(data)


@pytest.mark.parametrize("text", ["", "[]", "{}", "nothing", '{"format": 1}', "[" * 100_000])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(CertificateError):
        verify_certificate(tmp_path / "c.json")


def test_truncated_files_are_refused(certificate: Certificate, tmp_path: Path) -> None:
    text = certificate.to_json()
    for length in range(0, len(text) - 2, 997):
        (tmp_path / "c.json").write_text(text[:length])
        with pytest.raises(CertificateError):
            verify_certificate(tmp_path / "c.json")
    assert json.loads(text)["checksum"] == certificate.data["checksum"]
