"""Where a cell may take data and weights from, and the error if there are none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


class MissingError(Exception):
    """Raised if data, weights or a device are not available: the cell is skipped.

    The message names every way to provide what is missing.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Places a cell may read from in addition to the installed packages."""

    data_dir: Path | None = None
    """Directory of data files, e.g. with `glue/SST-2/train.tsv`."""
    rows: dict[str, Any] | None = None
    """Where the rows of a task of the user are (`meft_bench.child.tasks.own_rows`)."""
    allow_download: bool = False
    """Whether the Hugging Face hub may be used. It is never used otherwise."""
