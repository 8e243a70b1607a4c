"""Conversion of bytes to and from text; all other code uses plain integers."""

import re

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

_TOO_MANY = 2**63
"""Number of bytes that does not fit into the signed 64 bits that the system uses."""


def parse_bytes(text: str) -> int:
    """Return the integer that `8GiB`, `1.5 MiB` or `4096` denotes.

    Raises:
        ValueError: the text is not a positive number with a unit of 2¹⁰ steps, or is
            too large for the system.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B)?\s*", text, re.ASCII)
    size = float(match[1]) * _UNITS[match[2] or "B"] if match else 0.0
    if size >= _TOO_MANY:
        raise ValueError(f"{text!r} is too large a size; it should be below 8388608TiB")
    num_bytes = int(size)
    if num_bytes <= 0:
        raise ValueError(f"{text!r} is not a size; write it like 8GiB, 512MiB or 4096")
    return num_bytes


def format_bytes(num_bytes: int) -> str:
    """Return three digits and a unit: 1610612736 is `1.50 GiB`."""
    if abs(num_bytes) < 2**10:
        return f"{num_bytes} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        text = f"{num_bytes / _UNITS[unit]:.3g}"
        # `.3g` rounds 1000 and more to three digits with an exponent.
        if abs(float(text)) < 1000:
            break
    else:
        text = f"{num_bytes / _UNITS[unit]:.0f}"
    return f"{text} {unit}"
