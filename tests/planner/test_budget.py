"""Every row of the budget's table, everything that it refuses, and its arithmetic."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph_capture.formats import format_bytes
from planner.budget import LARGEST_BYTES, UNIT_BYTES, Budget, parse_budget
from planner.errors import BudgetError, PlannerError


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        (8_589_934_592, 8 * 1024**3),
        (np.int64(4096), 4096),
        ("12GiB", 12 * 1024**3),
        ("512 MiB", 512 * 1024**2),
        ("1KiB", 1024),
        ("2TiB", 2 * 1024**4),
        ("8GB", 8 * 1000**3),
        ("8gb", 8 * 1000**3),
        (" 7 MB ", 7 * 1000**2),
        ("+3kb", 3000),
        ("1.5 GiB", 3 * 512 * 1024**2),
        (".5KiB", 512),
        ("1.GB", 1000**3),
        ("8589934592 B", 8 * 1024**3),
        ("1 byte", 1),
        ("10 bytes", 10),
        ("1.9 bytes", 1),
    ],
)
def test_bytes_mean_bytes(written: int | str, size_bytes: int) -> None:
    budget = parse_budget(written)
    assert budget.size_bytes == size_bytes
    assert budget.percent is None
    assert budget.resolve(123) == size_bytes


@pytest.mark.parametrize(
    ("written", "percent", "of_1000"),
    [
        ("60%", "60", 600),
        ("12.5 %", "12.5", 125),
        ("150%", "150", 1500),
        ("33.33%", "33.33", 333),
        ("100%", "100", 1000),
    ],
)
def test_percent_is_of_eagers_peak(written: str, percent: str, of_1000: int) -> None:
    budget = parse_budget(written)
    assert budget.percent == Decimal(percent)
    assert budget.size_bytes is None
    assert budget.resolve(1000) == of_1000


@pytest.mark.parametrize(
    ("written", "wrong", "advice"),
    [
        ("8", "has no unit", '"8GiB"'),
        ("0.6", "has no unit", '"60%"'),
        ("0.125", "has no unit", '"12.5%"'),
        ("1e9", "not a number with a unit", '"12GiB"'),
        (0.6, "is a float without a unit", '"60%"'),
        (8e9, "is a float without a unit", "an integer of bytes"),
        (math.nan, "is a float", "an integer"),
        (math.inf, "is a float", "an integer"),
        (True, "is a boolean", '"12GiB"'),
        (None, "is a NoneType", '"12GiB"'),
        (b"8GB", "is a bytes", '"12GiB"'),
        ("", "is empty", '"12GiB"'),
        ("   ", "is empty", '"12GiB"'),
        ("0", "is zero", '"12GiB"'),
        (0, "is zero", '"12GiB"'),
        ("0GiB", "is zero", '"12GiB"'),
        ("0%", "is zero", '"12GiB"'),
        ("-1GiB", "is negative", '"12GiB"'),
        ("-5%", "is negative", '"12GiB"'),
        (-5, "is negative", '"12GiB"'),
        ("nan", "not a finite number", '"12GiB"'),
        ("NaN%", "not a finite number", '"12GiB"'),
        ("inf", "not a finite number", '"12GiB"'),
        ("-InfinityGiB", "not a finite number", '"12GiB"'),
        ("8G", "unknown unit 'G'", '"8GiB" or "8GB"'),
        ("8 parsecs", "unknown unit 'parsecs'", '"12GiB"'),
        ("8,5GB", "decimal point", '"12GiB"'),
        ("1_000MB", "thousands separators", '"12GiB"'),
        ("GiB", "not a number with a unit", '"12GiB"'),
        ("0.1B", "less than one byte", '"12GiB"'),
        ("60 % of it", "not a number", '"12GiB"'),
        ("٣GiB", "not a number", '"12GiB"'),
        (10**30, "more than any machine", '"12GiB"'),
        pytest.param(10**9999, "more than any machine", "an integer", id="thousands of digits"),
        ("9" * 70 + "B", "too long", '"12GiB"'),
    ],
)
def test_refused_with_what_and_what_to_write(written: object, wrong: str, advice: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_budget(written)  # type: ignore[arg-type]
    assert wrong in str(caught.value)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, PlannerError)


def test_a_budget_is_a_value() -> None:
    budget = parse_budget("60%")
    assert parse_budget(budget) is budget
    assert budget == parse_budget(" 60% ")
    assert hash(budget) == hash(parse_budget("60%"))
    assert str(budget) == "60%"
    with pytest.raises(AttributeError):
        budget.percent = Decimal(1)  # type: ignore[misc]


def test_neither_or_both_is_refused() -> None:
    with pytest.raises(BudgetError, match="either bytes or a percentage"):
        Budget("?")
    with pytest.raises(BudgetError, match="either bytes or a percentage"):
        Budget("?", 1, Decimal(1))
    with pytest.raises(BudgetError, match="finite"):
        Budget("?", percent=Decimal("nan"))


def test_percent_of_an_unknown_or_tiny_peak() -> None:
    with pytest.raises(BudgetError, match="not known"):
        parse_budget("60%").resolve(0)
    with pytest.raises(BudgetError, match="less than one byte"):
        parse_budget("0.1%").resolve(100)


@given(st.integers(1, LARGEST_BYTES))
def test_integers_are_exact(size_bytes: int) -> None:
    assert parse_budget(size_bytes).resolve(1) == size_bytes
    assert parse_budget(f"{size_bytes} B").size_bytes == size_bytes


@given(st.decimals(min_value="0.01", max_value=1000, places=3), st.sampled_from(sorted(UNIT_BYTES)))
def test_fractions_are_rounded_down_exactly(amount: Decimal, unit: str) -> None:
    exact = Fraction(amount) * UNIT_BYTES[unit]
    if exact < 1:
        return
    assert parse_budget(f"{amount}{unit}").size_bytes == math.floor(exact)


@given(st.decimals(min_value=1, max_value=500, places=2), st.integers(10**3, 10**15))
def test_percent_is_exact_and_monotone(percent: Decimal, peak_bytes: int) -> None:
    resolved = parse_budget(f"{percent}%").resolve(peak_bytes)
    assert resolved <= Fraction(percent) * peak_bytes / 100 < resolved + 1
    assert parse_budget(f"{percent + 1}%").resolve(peak_bytes) >= resolved


@given(st.text(max_size=20))
def test_any_text_is_a_budget_or_one_clear_error(text: str) -> None:
    try:
        budget = parse_budget(text)
    except BudgetError as refused:
        message = str(refused)
    else:
        message = ""
        assert (budget.size_bytes or 0) > 0 or (budget.percent or 0) > 0
    assert "\n" not in message


@pytest.mark.parametrize(
    ("size_bytes", "text", "short"),
    [
        (0, "0 bytes", "0 bytes"),
        (1, "1 byte", "1 byte"),
        (1023, "1023 bytes", "1023 bytes"),
        (1536, "1.50 KiB (1,536 bytes)", "1.50 KiB"),
        (8 * 1024**3, "8.00 GiB (8,589,934,592 bytes)", "8.00 GiB"),
        (1024**2 - 1, "1.00 MiB (1,048,575 bytes)", "1.00 MiB"),
        (-(1024**2), "-1.00 MiB (-1,048,576 bytes)", "-1.00 MiB"),
    ],
)
def test_sizes_are_printed_in_both_forms(size_bytes: int, text: str, short: str) -> None:
    assert format_bytes(size_bytes) == text
    assert format_bytes(size_bytes, short=True) == short


@given(st.integers(1024, LARGEST_BYTES))
def test_the_short_form_is_within_its_rounding(size_bytes: int) -> None:
    number, unit = format_bytes(size_bytes, short=True).split()
    scale = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert abs(float(number) - size_bytes / scale) <= 0.0051
