"""The rows of a task in the form that a kind of scoring requires."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meft_bench.child.tasks.batches import Example, Image


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Three splits; the last two are for `scores` of the same kind."""

    train: Sequence[Example | Image]
    validation: Sequence[Any]
    evaluation: Sequence[Any]
    mismatched: Sequence[Any] = ()
    """Rows of other genres, for scores of their own."""
