"""A task: labelled rows in three splits, and the metric that scores them.

train        rows for the optimizer
validation   rows that select the weights when training stops early, never scored
evaluation   rows for the score, never used to select weights
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from meft_bench.shared import protocol
from meft_bench.shared.cell import Cell

AnyRow = TypeVar("AnyRow")


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled example: one text, or a pair."""

    texts: tuple[str, ...]
    label: int | float
    """Its class, or for regression its number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Rows for training and scoring."""

    name: str
    num_labels: int | None
    """Number of classes, or 1 for regression.

    None for a language model, whose targets are tokens.
    """
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    evaluation: tuple[Row, ...]
    metric: str | None
    """A name of `metrics.METRICS`; None if there is nothing to score."""
    origin: str
    """Origin of the rows and which splits they are."""


def draw(
    rows: Sequence[AnyRow], cell: Cell
) -> tuple[tuple[AnyRow, ...], tuple[AnyRow, ...]]:
    """Draw `cell.train_rows` (0: all) by `cell.seed` and set a tenth of them aside.

    The tenth is set aside whether or not the cell stops early, so that cells with the
    same seed train on the same rows.

    Returns:
        (train, validation)
    """
    drawn = list(rows)
    random.Random(cell.seed).shuffle(drawn)
    if cell.train_rows:
        drawn = drawn[: cell.train_rows]
    num_validation = len(drawn) // protocol.ROWS_PER_VALIDATION_ROW
    return tuple(drawn[num_validation:]), tuple(drawn[:num_validation])


def first(rows: Sequence[AnyRow], cell: Cell) -> tuple[AnyRow, ...]:
    """Return the first `cell.eval_rows` rows; 0 returns all."""
    return tuple(rows[: cell.eval_rows or None])
