"""Sizes in bytes, as people write them."""

import pytest

from meft_bench.shared.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8GiB", 2**33), ("1.5 MiB", 3 * 2**19), ("4096", 4096), ("1B", 1)],
)
def test_parse_bytes(text: str, num_bytes: int) -> None:
    """Sizes are read in steps of 2¹⁰."""
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "8GB", "GiB", "-1MiB", "0", "1e3", "٣"])
def test_parse_no_bytes(text: str) -> None:
    """What is no size is refused, and shown."""
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["8388608TiB", "9223372036854775808", "9" * 400])
def test_parse_too_many_bytes(text: str) -> None:
    """What the system cannot count is refused before a child fails of it."""
    with pytest.raises(ValueError, match="is too large a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (999 * 2**20, "999 MiB"),
        (1000 * 2**20, "0.977 GiB"),
        (1023 * 2**20, "0.999 GiB"),
        (2**30 - 1, "1 GiB"),
        (3 * 2**29, "1.5 GiB"),
        (-1020 * 2**20, "-0.996 GiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    """Sizes have three digits, in the first unit of which there are below 1000."""
    assert format_bytes(num_bytes) == text
