"""One record as text, quantities in the units people read."""

import dataclasses
from collections.abc import Iterator

from meft_bench.quantities import format_bytes
from meft_bench.record import Record


def describe(record: Record) -> Iterator[tuple[str, str]]:
    """Pairs of a name and its value; what was not seen is left out."""
    yield "cell", record.cell.id
    yield "status", f"{record.status} {record.message}".strip()
    yield "sweep", record.sweep
    yield "started_at", record.started_at
    yield "wall_seconds", f"{record.wall_seconds:.1f}"
    for part in (record.measurement, record.environment):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if value not in (None, []):
                yield field.name, _format(field.name, value)


def _format(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{format_bytes(value)} ({value})"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(_format(name, entry) for entry in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return str(value)
