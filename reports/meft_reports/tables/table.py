"""A table as data; text that several tables share."""

from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd


class Heading(NamedTuple):
    """The name of a column, and what its cells are."""

    name: str
    meaning: str
    """A sentence, for formats whose columns can have a description."""


METHOD = Heading(
    "method", "Method of fine-tuning, with the options that distinguish its row."
)
WORKLOAD_NAME = Heading("workload", "What the cells of the row have in common.")
NUM_CELLS = Heading("cells", "Number of cells of the row.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A title, columns, rows of text, and notes for the reader.

    A cell with a number is a `meft_reports.format.ShownNumber`, which keeps it.
    """

    title: str
    columns: tuple[Heading, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text_columns: int = 1
    """Number of columns from the left that hold text; the others hold numbers."""
    notes: tuple[str, ...] = ()

    @property
    def header(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(column.name for column in self.columns)


def join_options(name: str, options: str) -> str:
    """Return a row's name: the method, and the options that distinguish it."""
    return f"{name} ({options})" if options else name


ONLY_SIZES = "Random weights: sizes and times only, a score would mean nothing."
FROM_SCRATCH = (
    "Random weights: scores are of training from scratch, on the rows of the task "
    "alone; of methods that freeze the backbone, they mean nothing."
)


def notes_on(rows: pd.DataFrame) -> list[str]:
    """Return notes on rows: random weights, numbers that are predictions."""
    notes = []
    if rows["random_weights"].any():
        is_scored = rows["random_weights"] & rows["score"].notna()
        notes.append(FROM_SCRATCH if is_scored.any() else ONLY_SIZES)
    if rows["device"].str.startswith("virtual-").any():
        notes.append(
            "Predicted, not measured: nothing ran on a virtual GPU. How close such "
            "predictions were to an H200: docs/virtual-gpu.md."
        )
    return notes


def notes_on_scores(rows: pd.DataFrame) -> list[str]:
    """Return notes on rows that were trained by older code."""
    notes = []
    if rows["equal_batches"].any():
        notes.append(
            "Trained by older code, in which the micro-batches of a step counted the "
            "same, whatever their numbers of target tokens: gradients are not those of "
            "the mean over all tokens of a step."
        )
    if rows["undecayed_rows"].any():
        notes.append(
            "Trained by older code, in which rows of sparse adapters had no weight "
            "decay, where the neurons of dense adapters had."
        )
    return notes
