"""The report: exact counts on a chain whose every byte is known, and folding of equal blocks."""

from __future__ import annotations

import pytest

from planner.folding import fold_label, template_of
from planner.plan_file import Plan
from planner.report import report_on
from planner.report_text import columns, report_text
from tests.planner.plans import RECOMPUTE_ONE, chain, make_plan, plan_fields


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
    peak = report_on(plan).peak
    assert peak.peak_bytes == plan.predicted_peak_bytes
    assert sum(size for _, size in peak.lines) == peak.peak_bytes
    assert all(size > 0 for _, size in peak.lines)
    lines = dict(peak.lines)
    assert lines["parameters"] == 40
    assert (".grad of earlier micro-batches" in lines) == accumulate
    assert "random states and copies" not in lines
    assert sum(row.size_bytes for row in peak.alive) == lines["activations"] + lines.get("gradients", 0)


def test_the_peak_names_its_operator_and_folds_equal_tensors() -> None:
    peak = report_on(make_plan()).peak
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
    assert "layers.{0-2,4-5}  5          5           0  500 bytes    0 bytes              0" in text
    assert "total" in text
    assert "peak: 650 bytes in a first micro-batch, while b5 runs (backward; layers.5)" in text
    assert "float32[5, 5]" in text
    assert "and 1 smaller ones, 100 bytes" in text


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
