"""Rows of a user's file, read by `datasets`: `csv:FILE`, `jsonl:FILE`, `parquet:FILE`.

`dataset:DIR` is a folder that `Dataset.save_to_disk` has written. No script of a data
set is run, nothing is fetched, and what `datasets` writes is in a temporary folder, so
that cells that run at the same time do not meet. In CSV files every value is text, and
only an empty one is missing: `None` and `NA` are words.
"""

import csv
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from meft_bench.shared.row_kinds import TAB_SUFFIXES

_EMPTY = "corresponds to no data"
"""In the message of `datasets` for a file without rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of a file."""

    file: str
    """The file, as messages name it."""
    columns: dict[str, list[Any]]
    """Values of each column, by its name."""
    class_names: dict[str, list[str]]
    """Of columns whose values are numbers of named classes: the names."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def read(place: str) -> Rows:
    """Return the rows at a place.

    Raises:
        ValueError: they cannot be read, or there are none; the message is one line.
    """
    kind, _, file = place.partition(":")
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = _read(kind, file, folder)
            columns = {name: list(found[name]) for name in found.column_names}
    except Exception as error:  # of many types, and often around another
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        if _EMPTY in str(error):
            raise ValueError(f"{file}: it has no rows") from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{file}: cannot be read as {kind}: {reason}") from error
    if not len(found):
        raise ValueError(f"{file}: it has no rows")
    names = {
        name: feature.names
        for name, feature in found.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return Rows(file=file, columns=columns, class_names=names)


def _read(kind: str, file: str, folder: str) -> Any:
    if kind == "dataset":
        return datasets.load_from_disk(file)
    where: dict[str, Any] = {"cache_dir": folder, "keep_in_memory": True}
    if kind == "jsonl":
        return datasets.Dataset.from_json(file, **where)
    if kind == "parquet":
        return datasets.Dataset.from_parquet(file, **where)
    tabs = Path(file).suffix in TAB_SUFFIXES
    with Path(file).open(encoding="utf-8-sig", newline="") as lines:
        header = _checked(csv.reader(lines, delimiter="\t" if tabs else ","), tabs)
    text = datasets.Features(dict.fromkeys(header, datasets.Value("string")))
    return datasets.Dataset.from_csv(
        file,
        features=text,
        sep="\t" if tabs else ",",
        keep_default_na=False,
        encoding="utf-8-sig",
        **where,
    )


def _checked(rows: Iterator[list[str]], tabs: bool) -> list[str]:
    """Return the header of a CSV file, of which every row has as many values.

    Raises:
        ValueError: a name is there twice, a row has more values than the header, or a
            quote joins lines of a file that is separated by tabs.
    """
    header = next(rows, [])
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise ValueError(f"two columns are called {twice[0]!r}; rename one")
    for number, row in enumerate(rows, start=1):
        if len(row) > len(header):
            raise ValueError(
                f"row {number} has {len(row)} values, and the header {len(header)} "
                "names: put values with separators in quotes"
            )
        if tabs and any("\n" in value for value in row):
            raise ValueError(
                f"row {number} has a value of several lines, which begins with a "
                'quote: write "" for a quote within quotes, or a .csv file'
            )
    return header
