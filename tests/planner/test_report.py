"""The report: exact counts on a chain whose every byte is known, and folding of equal blocks."""

from __future__ import annotations

import dataclasses

import pytest

from planner.folding import fold_label, template_of
from planner.plan_file import Plan
from planner.report import PeakReport, report_on
from planner.report.lifetimes import alive_at
from planner.report.modules import module_rows, total_row
from planner.report.text import columns, report_text
from solvers.schedule import Schedule
from solvers.simulator import ScheduleError, simulate
from tests.planner.plans import RECOMPUTE_ONE, chain, make_plan, plan_fields
from tests.solvers.random_graphs import Features, random_graph


def peak_of(plan: Plan) -> PeakReport:
    peak = report_on(plan).peak
    assert peak is not None
    return peak


def test_modules_of_one_recomputed_layer() -> None:
    rows = {row.label: row for row in report_on(make_plan()).modules}
    assert list(rows) == ["layers.{0-2,4-5}", "layers.3"]
    kept, recomputed = rows.values()
    assert (kept.modules, kept.operators, kept.recomputed_operators) == (5, 5, 0)
    assert (kept.kept_bytes, kept.released_bytes, kept.recomputed_seconds) == (500, 0, 0.0)
    assert (recomputed.modules, recomputed.operators, recomputed.recomputed_operators) == (1, 1, 1)
    assert (recomputed.kept_bytes, recomputed.released_bytes, recomputed.recomputed_seconds) == (0, 100, 1.0)


def test_store_all_keeps_everything() -> None:
    (row,) = report_on(Plan(**plan_fields(chain()))).modules
    assert (row.label, row.modules, row.kept_bytes, row.released_bytes) == ("layers.{0-5}", 6, 600, 0)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("order", [None, (*RECOMPUTE_ONE, 12)])
def test_the_lines_of_the_peak_add_up(accumulate: bool, order: tuple[int, ...] | None) -> None:
    plan = Plan(**plan_fields(chain(gradient_accumulation=accumulate), order))
    peak = peak_of(plan)
    assert peak.peak_bytes == plan.predicted_peak_bytes
    assert sum(size for _, size in peak.lines) == peak.peak_bytes
    assert all(size > 0 for _, size in peak.lines)
    lines = dict(peak.lines)
    assert lines["parameters"] == 40
    assert (".grad of earlier micro-batches" in lines) == accumulate
    assert "random states and copies" not in lines
    assert sum(row.size_bytes for row in peak.alive) == lines["activations"] + lines.get("gradients", 0)


def test_the_peak_names_its_operator_and_folds_equal_tensors() -> None:
    peak = peak_of(make_plan())
    assert peak.seconds == 6.0
    assert (peak.operator, peak.phase, peak.module, peak.again) == ("b5", "backward", "layers.5", False)
    biggest = peak.alive[0]
    assert (biggest.label, biggest.values, biggest.size_bytes) == ("layers.{0-2,4-5}", 5, 500)
    assert (biggest.shape, biggest.dtype, biggest.target, biggest.source) == (
        (5, 5),
        "float32",
        "aten.mm",
        "model.py:10",
    )


def test_the_text_has_both_tables_and_counts_what_it_leaves_out() -> None:
    text = report_text(report_on(make_plan()), biggest=1)
    assert (
        "layers.{0-2,4-5}  5          5           0  500 bytes    0 bytes              0  fits beside the rest" in text
    )
    assert "layers.3          1          1           1    0 bytes  100 bytes            1 s  released, for " in text
    assert "total" in text
    assert "peak: 650 bytes in a first micro-batch, 6 s into the step, while b5 runs (backward; layers.5)" in text
    assert "float32[5, 5]" in text
    assert "and 1 smaller ones, 100 bytes" in text


def test_why_a_module_keeps_what_it_keeps() -> None:
    graph = chain()
    everything = Schedule.store_all(graph)
    assert [row.reason for row in module_rows(graph, everything)] == ["everything fits"]
    once = dataclasses.replace(graph.operators[1], recomputable=False, keep_reason="it draws random numbers")
    dear = dataclasses.replace(graph.operators[2], seconds=9.0)
    operators = (graph.operators[0], once, dear, *graph.operators[3:])
    graph = dataclasses.replace(graph, operators=operators)
    schedule = Schedule.from_order(graph, (*RECOMPUTE_ONE, 12))
    reasons = {row.label: row.reason for row in module_rows(graph, schedule)}
    assert reasons["layers.1"] == "must be kept: it draws random numbers"
    assert reasons["layers.2"].startswith("dear: ")
    assert reasons["layers.3"].startswith("released, for ")
    assert reasons["layers.{0,4-5}"] == "fits beside the rest"
    assert total_row(module_rows(graph, schedule)).kept_bytes == 500


@pytest.mark.parametrize("seed", range(12))
def test_what_is_alive_adds_up_to_the_simulators_timeline(seed: int) -> None:
    graph = random_graph(seed, 6, Features(gradients=0.6, late_delivery=0.4, workspace=0.4, gradient_accumulation=True))
    order = [*range(len(graph)), *(i for i in range(0, len(graph), 3) if graph.operators[i].recomputable)]
    for schedule in (Schedule.store_all(graph), Schedule.from_order(graph, order)):
        try:
            simulation = simulate(graph, schedule)
        except ScheduleError:
            continue  # a recomputation without its inputs: the order was made without looking
        later = simulation.regime == "later"
        resident = graph.resident_total_bytes + (graph.accumulated_gradient_bytes if later else 0)
        for position, index in enumerate(schedule.order):
            alive = sum(graph.values[v].size_bytes for v in alive_at(graph, schedule, position, later=later))
            needed = resident + alive + graph.operators[index].workspace_bytes
            assert needed == simulation.timeline_bytes[position]


def test_the_ledger_adds_up_before_and_after() -> None:
    plan = make_plan()
    ledger = report_on(plan).ledger
    assert ledger.before_bytes == plan.store_all_peak_bytes == sum(row.before_bytes for row in ledger.rows)
    assert ledger.after_bytes == plan.predicted_peak_bytes == sum(row.after_bytes for row in ledger.rows)
    assert ledger.unused_bytes == 5
    assert [row.label for row in ledger.rows][:2] == ["parameters", "inputs"]
    changing = {row.label: row.after_bytes for row in ledger.rows if row.schedulable}
    assert list(changing) == ["activations", "gradients", "workspace of the operator"]
    assert changing["gradients"] == changing["workspace of the operator"] == 0  # nothing, and it is said


def test_the_plan_says_what_its_figures_mean() -> None:
    text = str(make_plan(lower_bound=0.03, gap=1 / 19 - 0.03))
    assert "a step takes 1 s longer than without checkpointing (19 s, as priced for cpu)" in text
    assert "3.00 %: nothing within the budget costs less, proven for every schedule, in whatever order" in text
    assert "a perfect schedule of those would save at most 430 ms a step" in text
    kept = str(Plan(**plan_fields(chain())))
    assert "a step takes as long as without a plan" in kept
    assert "there is no better plan" in kept


@pytest.mark.parametrize(
    ("modules", "label"),
    [
        (["h.0.attn"], "h.0.attn"),
        (["h.0.attn", "h.1.attn", "h.2.attn"], "h.{0-2}.attn"),
        (["h.0", "h.2", "h.10", "h.3"], "h.{0,2-3,10}"),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], "a.{0-1}.b.{0-1}"),
        (["h.1", "h.1"], "h.1"),
        ([""], ""),
    ],
)
def test_folding(modules: list[str], label: str) -> None:
    assert len({template_of(module) for module in modules}) == 1
    assert fold_label(modules) == label


def test_columns_align() -> None:
    assert columns([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc  d"
    assert columns([("a", "bb"), ("ccc", "d")], left=1) == "a    bb\nccc   d"
