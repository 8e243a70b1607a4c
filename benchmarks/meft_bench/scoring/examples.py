"""The rows of a task as a kind of scoring wants them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meft_bench.tasks.batches import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Three splits; the last two are for `scores` of the same kind."""

    train: list[Example]
    validation: Sequence[Any]
    evaluation: Sequence[Any]
