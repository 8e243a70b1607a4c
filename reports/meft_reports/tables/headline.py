"""The headline as a table: what a step of every method takes on a real GPU."""

from typing import Any

import pandas as pd

from meft_reports.format import NOTHING, format_bytes, format_error
from meft_reports.headline import METHODS, NEEDS, find
from meft_reports.summary import worst
from meft_reports.tables.table import Heading, Table

COLUMNS = (
    Heading("method", "Method of fine-tuning, in words."),
    Heading("peak of a step", "Peak of allocated bytes in a step."),
    Heading("weights and optimizer state", "Bytes allocated between two steps."),
    Heading("activations", "Peak of a step minus weights and optimizer state."),
    Heading(
        "saved for backward",
        "Bytes that the forward pass saves for the backward pass.",
    ),
    Heading(
        "worst gradient error",
        "Relative error of the gradients of the worst block, against the same method "
        "with stored activations.",
    ),
)
NOTES = (
    "Measured on the GPU; weights and input are random. Activations are what the peak "
    "of a step needs beyond weights and optimizer state, gradients included. Saved are "
    "the tensors that the forward pass keeps for the backward pass. The gradient error "
    "is that of the worst block, against the same method with stored activations. "
    "Attention on CUDA sums in an order that varies between runs, which gives errors "
    "of 1e-7 (FP32) to 1e-2 (BF16) by itself, and 0 with deterministic kernels.",
)

__all__ = ["NEEDS", "make"]


def make(frame: pd.DataFrame) -> list[Table]:
    """One table, or none where no real GPU has run all of the methods."""
    found = find(frame)
    if found is None:
        return []
    title, cells = found
    return [
        Table(
            title=f"What a step takes · {title}",
            columns=COLUMNS,
            rows=tuple(
                (words, *_row(cells[method])) for method, words in METHODS.items()
            ),
            notes=NOTES,
        )
    ]


def _row(cell: "pd.Series[Any]") -> tuple[str, ...]:
    errors = cell["gradient_error"]
    has_errors = hasattr(errors, "__len__")
    return (
        format_bytes(cell["peak_allocated_bytes"]),
        format_bytes(cell["model_state_bytes"]),
        format_bytes(cell["peak_activation_bytes"]),
        format_bytes(cell["saved_bytes"]),
        format_error(worst(pd.Series([errors]))) if has_errors else NOTHING,
    )
