import re
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from meft_reports.columns import MEASURED
from meft_reports.columns.column import Column
from meft_reports.errors import ReportError, UnknownName
from meft_reports.threshold import PATTERN, SIZES, parse_threshold

NUMBERS = st.decimals(min_value=0, max_value=10**9, places=3)
BYTES = st.integers(min_value=0, max_value=2**50)


@given(number=NUMBERS, unit=st.sampled_from(sorted(SIZES)), expected=BYTES)
def test_a_size_allows_as_many_bytes_at_any_value(
    number: Decimal, unit: str, expected: int
) -> None:
    """`5MiB` is 5 x 2**20 bytes exactly, whatever was expected."""
    threshold = parse_threshold(f"saved:{number}{unit}")
    assert threshold.allowed(Fraction(expected)) == Fraction(number) * SIZES[unit]


@given(number=NUMBERS, expected=BYTES)
def test_a_share_grows_with_what_is_expected(number: Decimal, expected: int) -> None:
    """`20%` is a fifth of the expected value exactly."""
    threshold = parse_threshold(f"saved:{number}%")
    assert threshold.allowed(Fraction(expected)) * 100 == Fraction(number) * expected


@given(number=NUMBERS, column=st.sampled_from(MEASURED))
def test_a_plain_number_is_in_the_unit_of_the_column(
    number: Decimal, column: Column
) -> None:
    """Short and full names of a column mean the same."""
    short = parse_threshold(f"{column.short_name}:{number}")
    full = parse_threshold(f"{column.name}:{number}")
    assert short == full
    assert short.allowed(Fraction(7)) == Fraction(number)


@given(text=st.text(max_size=12))
def test_whatever_is_not_in_the_grammar_is_refused(text: str) -> None:
    """No text is read as a threshold by accident."""
    assume("@" not in text and PATTERN.fullmatch(text) is None)
    with pytest.raises(ReportError, match="is not a threshold"):
        parse_threshold(f"saved:{text}")


@pytest.mark.parametrize(
    "text", ["", "-1", "5 mib", "5MB", "%", "1e999", "nan", "inf", "٣", "1_000", "0x1"]
)
def test_near_misses_are_refused(text: str) -> None:
    """Negative, unbounded, or in units that we do not use."""
    with pytest.raises(ReportError, match="is not a threshold"):
        parse_threshold(f"saved:{text}")


def test_an_unknown_column_names_the_nearest() -> None:
    """Also for lists, which hold no single number."""
    with pytest.raises(UnknownName, match="'peak_alocated': did you mean 'peak_alloc"):
        parse_threshold("peak_alocated:0")
    with pytest.raises(UnknownName, match="loss_curve"):
        parse_threshold("loss_curve:0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("saved", "'saved': expected COLUMN:THRESHOLD"),
        ("step_seconds:5MiB", "step_seconds is not in bytes"),
    ],
)
def test_a_mistake_is_named(text: str, message: str) -> None:
    """The error quotes what was given and says what was expected."""
    with pytest.raises(ReportError, match=re.escape(message)):
        parse_threshold(text)


@pytest.mark.parametrize(
    ("limit", "amount"),
    [
        ("0", 0),
        ("7", 7),
        ("7B", 7),
        ("1KiB", 1024),
        ("1.5KiB", 1536),
        ("1MiB", 1_048_576),
        ("3 GiB", 3_221_225_472),
        ("2.5e2", 250),
        ("25%", 50),
        ("0.5%", 1),
    ],
)
def test_what_is_allowed_in_plain_numbers(limit: str, amount: int) -> None:
    """Of 200 expected bytes, and of 200 too few."""
    threshold = parse_threshold(f"saved:{limit}")
    assert threshold.allowed(Fraction(200)) == amount
    assert threshold.allowed(Fraction(-200)) == amount
    assert threshold.relative == limit.endswith("%")


@pytest.mark.parametrize("name", ["gradient_error", "h2d_update", "routing_recall"])
def test_a_list_with_a_better_direction_can_be_compared(name: str) -> None:
    """Under its short name too; a list without one is no column of the gate."""
    assert parse_threshold(f"{name}:0").column.short_name == name
    with pytest.raises(UnknownName, match=name):
        parse_threshold(f"{name}s:0")
