"""Rows as they are read, before a task is made of them.

A row is a dictionary with the columns named in `fields` of its task's facts, and

    labels, numbers   `label`: the index or the name of a class, or a number
    images            `image`: gray values from 0 to 255, `height width`; `label`
    options           `options`: their texts; `right`: the index of the right one
    words             `accepted`: the right answers, the one to learn first
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meft_bench.child.tasks.files import decode

RowDict = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRows:
    """The rows of the splits of a data set."""

    train: list[RowDict]
    evaluation: list[RowDict]
    mismatched: list[RowDict] = field(default_factory=list)
    """Rows of other genres that are scored as well, as in MNLI."""


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a file, not compressed."""

    path: Path
    data: bytes

    @property
    def text(self) -> str:
        """The content as text, without byte-order mark.

        Raises:
            ValueError: it is not text in UTF-8, or in UTF-16 with a byte-order mark.
        """
        return decode(self.data, self.path)
