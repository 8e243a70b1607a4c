"""Show one record as text, with quantities in readable units."""

import dataclasses
from collections.abc import Iterator

from meft_bench.shared.record import Record
from meft_bench.shared.units import format_bytes

MAX_LENGTH = 1000
"""Number of characters of one text that are shown."""


def describe(record: Record) -> Iterator[tuple[str, str]]:
    """Yield pairs of a name and its value; missing values are omitted.

    Texts are printable, and cut with a mark if they are too long.
    """
    yield "cell", printable(record.cell.id)
    yield "status", printable(f"{record.status} {record.message}".strip())
    for value, alias in (record.aliases or {}).items():
        yield printable(alias), printable(value)
    yield "sweep", printable(record.sweep)
    yield "started_at", printable(record.started_at)
    yield "wall_seconds", f"{record.wall_seconds:.1f}"
    environment = dataclasses.asdict(record.environment)
    for name, value in (record.measurement.to_json() | environment).items():
        if value not in (None, []):
            yield name, _format(name, value)


def printable(text: str) -> str:
    """Return `text` with control characters escaped, cut if it is too long."""
    shown = "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape").decode("ascii")
        for character in text[:MAX_LENGTH]
    )
    num_left_out = len(text) - MAX_LENGTH
    return f"{shown}… [{num_left_out:,} more characters]" if num_left_out > 0 else shown


def _format(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{format_bytes(value)} ({value})"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(_format(name, entry) for entry in value)
    if isinstance(value, dict):
        return printable(", ".join(f"{key} {entry}" for key, entry in value.items()))
    return printable(str(value))
