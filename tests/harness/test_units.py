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
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (3 * 2**29, "1.5 GiB")],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    """Sizes are shown in the largest unit that they reach."""
    assert format_bytes(num_bytes) == text
