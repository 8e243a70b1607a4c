"""Tables of plain values as compact JSON: one list per column.

    {"rows": 3, "columns": {"method": {"words": ["full", "lora"], "at": [0, 1, 0]},
                            "score": {"values": [0.5, null, 0.25]}}}

A column of a few words holds each word once. A column without a value is left out, and
a number that is not finite is null, as JSON has no other.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Encoded = dict[str, Any]


def encode(rows: Sequence[Mapping[str, Any]]) -> Encoded:
    """Return rows, which are dictionaries with the same keys, as columns."""
    names = list(rows[0]) if rows else []
    return encode_columns({name: [row[name] for row in rows] for name in names})


def encode_columns(columns: Mapping[str, list[Any]]) -> Encoded:
    """Return columns of equal length."""
    encoded = {name: _column(values) for name, values in columns.items()}
    return {
        "rows": len(next(iter(columns.values()), [])),
        "columns": {name: column for name, column in encoded.items() if column},
    }


def to_bytes(value: Any) -> bytes:
    """Return a value as JSON; the same value gives the same bytes."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")


def _column(values: list[Any]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], str):
        words = sorted(set(known))
        if len(words) < len(values) / 2 or len(values) == 1:
            places = {word: place for place, word in enumerate(words)}
            at = [None if v is None else places[v] for v in values]
            return {"words": words, "at": at}
        return {"values": values}
    return {"values": [_finite(value) for value in values]}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, list):
        return [_finite(element) for element in value]
    return value
