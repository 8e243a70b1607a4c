"""The facts of a task: what it asks, how it is scored, where its rows may come from.

Every task is one file of this folder with a `FACTS` of the same fields in the same
order. Facts are data: the parent process reads them without the libraries of a child,
and the functions that they name by `FILE:FUNCTION` are in `meft_bench.child.tasks`.
"""

from dataclasses import dataclass
from pathlib import Path

LABELS = "labels"
"""Kind of task: a classifier of texts."""
NUMBER = "number"
"""Kind of task: a regression on texts."""
IMAGES = "images"
"""Kind of task: a classifier of images."""
OPTIONS = "options"
"""Kind of task: a language model ranks options by their likelihood."""
WORDS = "words"
"""Kind of task: a language model generates an answer."""
RECALL = "recall"
"""Kind of task: a language model recalls random tokens that belong to a name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """A description of the rows of each split, for the record."""

    train: str
    evaluation: str


OFFICIAL_DEV = Splits(train="official train rows", evaluation="official dev rows")
OFFICIAL_TEST = Splits(train="official train rows", evaluation="official test rows")
OFFICIAL_MATCHED_DEV = Splits(
    train="official train rows", evaluation="official matched dev rows"
)
OFFICIAL = (OFFICIAL_DEV, OFFICIAL_TEST, OFFICIAL_MATCHED_DEV)
"""Descriptions of splits that are all official rows."""
PARTS_OF_TRAIN = Splits(
    train="official train rows, a random part of all",
    evaluation="held-out official train rows, which are not the official dev rows",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFiles:
    """Rows in files of the data directory, each plain or gzip-compressed."""

    folder: str
    """Folder of the files in the data directory."""
    names: tuple[str, ...]
    """Names of the files, without .gz, in the order in which `read` takes them."""
    read: str
    """`FILE:FUNCTION` from the contents of the files to the rows of the splits."""
    splits: Splits
    """Which rows they are."""
    columns: tuple[str, ...] = ()
    """Names of the columns of files that have no header line."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Columns that the files call otherwise: (name in the file, name in `fields`)."""
    has_broken_lines: bool = False
    """Whether lines with too few or too many columns are left out, not refused."""


def places(root: Path, folder: str) -> tuple[Path, ...]:
    """Return the places where the folder of a task may be.

    They are in the data directory, in it where it is that of all GLUE tasks, and next
    to it.

    Args:
        root: the data directory.
        folder: `DataFiles.folder`.
    """
    return (root / folder, root / Path(folder).name, root.parent / folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hub:
    """Rows of a repository of the Hugging Face hub, read through `datasets`."""

    name: str
    config: str = ""
    train: str = "train"
    """Name of the split to train with."""
    evaluation: str = "validation"
    """Name of the split to score with."""
    mismatched: str = ""
    """Name of a second split to score with, as MNLI has it; empty for none."""
    read: str
    """`FILE:FUNCTION` from a row of the repository to a row of the task."""
    splits: Splits
    """Which rows they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """Rows in the files of an installed package."""

    name: str
    """Name of the distribution."""
    install: str
    """Arguments of `pip install` by which it is installed."""
    read: str
    """`FILE:FUNCTION` that returns the rows of the splits."""
    splits: Splits
    """Which rows they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FromSeed:
    """Rows made from the seed of a cell: `train_rows` facts, which need no data.

    Cells with the same seed and number have the same rows. What is trained is what is
    scored, so that a trial is scored on its own facts.
    """

    read: str
    """`FILE:FUNCTION` from the number of facts and the seed to the rows."""
    splits: Splits
    """Which rows they are."""


Way = DataFiles | Hub | Package | FromSeed
"""One place to take rows from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All that is particular to one task."""

    name: str
    """Name of the task in a sweep."""
    title: str
    """Name of the data set, for records."""
    asks: str
    """What the task asks, as a clause."""
    kind: str
    """`LABELS`, `NUMBER`, `IMAGES`, `OPTIONS`, `WORDS` or `RECALL`."""
    fields: tuple[str, ...]
    """Columns of a row that the model reads: its texts, or those in `prompt`."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in order."""
    prompt: str = ""
    """Text before an answer, with `{field}` where a column is inserted."""
    max_new_tokens: int = 0
    """Maximum number of generated tokens."""
    metric: str
    """Name of the metric; its first value is the score, by which weights are selected.

    One of `child/tasks/metrics.py`, or of `child/scoring/rules.py` for language models.
    """
    protocol: str
    """How the official evaluation differs from a plain mean over rows, if it does."""
    licence: str
    """Licence, or terms of use, of the data."""
    ways: tuple[Way, ...]
    """Places to take rows from, the first that is available."""

    @property
    def is_made(self) -> bool:
        """Whether the rows are made from a seed."""
        return isinstance(self.ways[0], FromSeed)
