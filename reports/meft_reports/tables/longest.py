"""The longest sequence of each method, and what its step copies over the link."""

from typing import Any

import pandas as pd

from meft_reports.format import (
    NOTHING,
    ShownNumber,
    format_bytes,
    format_seconds,
    is_null,
)
from meft_reports.longest import NEEDS, best_rival, find, words_of
from meft_reports.tables.table import METHOD, Heading, Table, notes_on

COLUMNS = (
    METHOD,
    Heading(
        "longest sequence (tokens)",
        "Number of tokens of the longest sequence with which a step fits.",
    ),
    Heading(
        "against the best rival on the device",
        "Longest sequence divided by that of the best method without reversible blocks "
        "that copies nothing to the host.",
    ),
    Heading(
        "against the best offloaded rival",
        "Longest sequence divided by that of the best method without reversible blocks "
        "that keeps tensors on the host.",
    ),
    Heading(
        "over the link in a step", "Bytes copied to and from the device in a step."
    ),
    Heading("of it per token", "These bytes divided by the tokens of the step."),
    Heading(
        "against that rival",
        "Bytes per token divided by those of the best offloaded rival.",
    ),
    Heading("link at least", "Lower bound of the time of these copies in a step."),
    Heading(
        "arithmetic and memory at least",
        "Lower bound of the time of the step's arithmetic and memory traffic.",
    ),
)
NOTES = (
    "The longest sequence with which a step fits, one row per batch. Rivals are the "
    "methods without reversible blocks. Bytes over the link are those of both "
    "directions, per token to compare steps of different lengths. Both times are lower "
    "bounds, by the vendor's rates. `≥`: the positions of the model are the limit, not "
    "memory; its shape with more positions, such as `qwen3-8b-1m`, has another answer.",
)

__all__ = ["NEEDS", "make"]


def make(frame: pd.DataFrame) -> list[Table]:
    """Return a table for each GPU and backbone."""
    return [
        Table(
            title=f"Longest sequence · {title}",
            columns=COLUMNS,
            rows=tuple(_row(cell, part) for _, cell in part.iterrows()),
            notes=(*NOTES, *_question(part), *notes_on(part)),
        )
        for title, part in find(frame)
    ]


def _question(part: pd.DataFrame) -> tuple[str, ...]:
    """Return what the search has asked, which is the same for all its cells."""
    question = part["sweep_caveats"].iloc[0]
    return () if is_null(question) or not question else (str(question),)


def _row(cell: "pd.Series[Any]", part: pd.DataFrame) -> tuple[str, ...]:
    if not cell["fits"]:
        return (cell["name"], "none", *[NOTHING] * (len(COLUMNS) - 2))
    on_device, offloaded = (best_rival(part, stays=stays) for stays in (True, False))
    moved, per_token = _per_token(cell)
    rival = None if offloaded is None else _per_token(offloaded)[1]
    is_small = cell["stays"] or per_token is None
    return (
        cell["name"],
        words_of(cell),
        _times(cell, on_device),
        _times(cell, offloaded),
        format_bytes(moved),
        NOTHING if is_small else format_bytes(per_token),
        NOTHING if is_small or not rival else _quotient(per_token, rival),
        format_seconds(cell["link_seconds_at_least"]),
        format_seconds(cell["seconds_at_least"]),
    )


def _times(cell: "pd.Series[Any]", rival: "pd.Series[Any] | None") -> str:
    if rival is None or cell["is_at_least"] or rival["is_at_least"]:
        return NOTHING
    return _quotient(cell["seq_len"], rival["seq_len"])


def _quotient(one: Any, other: Any) -> str:
    return ShownNumber(f"{one / other:.2f}", "", one / other)


def _per_token(cell: "pd.Series[Any]") -> tuple[Any, Any]:
    """Return the bytes over the link in a step, and of it per token."""
    moved = cell["transfer_bytes"]
    tokens = cell["seq_len"] * cell["batch_size"] * cell["accumulation"]
    return moved, None if is_null(moved) or not tokens else moved / tokens
