"""Where a cell may take data and weights from, and what it says when there are none."""

from dataclasses import dataclass
from pathlib import Path


class MissingError(Exception):
    """Data, weights or a device are not at hand: the cell is skipped, not failed.

    The message names every way to provide what is missing.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Places a cell may read from beside the installed packages."""

    data_dir: Path | None = None
    """Directory of data files, e.g. with `glue/SST-2/train.tsv`."""
    allow_download: bool = False
    """Whether the Hugging Face hub may be asked. Never asked otherwise."""
