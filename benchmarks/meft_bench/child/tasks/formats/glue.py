"""GLUE's files (Wang et al., ICLR 2019): tab-separated tables whose quotes are text.

tables            train.tsv and dev.tsv, or two files of development rows
mrpc_originals    MRPC's original training file and the ids of its development rows
subsets           random parts of the training rows, as JSON objects
subsets_and_dev   such parts to train with, and dev.tsv
hub_row           a row of the hub, whose columns have the names of the task's
"""

import json
from typing import Any

from meft_bench.child.tasks.files import table
from meft_bench.child.tasks.rows import Content, RowDict, SplitRows
from meft_bench.shared.tasks.facts import DataFiles


def tables(
    way: DataFiles, train: Content, dev: Content, *mismatched: Content
) -> SplitRows:
    """Return the rows of tables in GLUE's usual layout.

    Args:
        way: names the columns.
        train: the training rows.
        dev: the development rows.
        mismatched: those of other genres, if there are any.
    """
    return SplitRows(
        train=_table(way, train),
        evaluation=_table(way, dev),
        mismatched=[row for content in mismatched for row in _table(way, content)],
    )


def mrpc_originals(way: DataFiles, originals: Content, dev_ids: Content) -> SplitRows:
    """Return MRPC's rows, split by the ids of the development rows.

    Args:
        way: names the columns.
        originals: the original training file.
        dev_ids: the pairs of ids of its rows that are development rows.
    """
    ids = table(dev_ids.text, str(dev_ids.path), ("1", "2"), is_quoted=False)
    chosen = {(row["1"], row["2"]) for row in ids}
    train: list[RowDict] = []
    dev: list[RowDict] = []
    for row in _table(way, originals):
        is_dev = (row["#1 ID"], row["#2 ID"]) in chosen
        (dev if is_dev else train).append(row)
    return SplitRows(train=train, evaluation=dev)


def subsets(way: DataFiles, train: Content, held_out: Content) -> SplitRows:
    """Return the rows of two parts of the training rows.

    Args:
        way: names the columns.
        train: the part to train with.
        held_out: the part to score with.
    """
    return SplitRows(train=_objects(way, train), evaluation=_objects(way, held_out))


def subsets_and_dev(
    way: DataFiles, train: Content, also_train: Content, dev: Content
) -> SplitRows:
    """Return the rows of two parts of the training rows, and the development rows.

    Args:
        way: names the columns.
        train: a part to train with.
        also_train: another part to train with.
        dev: the table of development rows.
    """
    return SplitRows(
        train=[*_objects(way, train), *_objects(way, also_train)],
        evaluation=_table(way, dev),
    )


def hub_row(row: dict[str, Any]) -> RowDict:
    """Return a row of the hub as it is."""
    return row


def _table(way: DataFiles, content: Content) -> list[RowDict]:
    rows = table(
        content.text,
        str(content.path),
        way.columns or None,
        is_quoted=False,
        leave_out_broken=way.has_broken_lines,
    )
    return [_renamed(way, row) for row in rows]


def _objects(way: DataFiles, content: Content) -> list[RowDict]:
    rows = json.loads(content.text)
    return [_renamed(way, row) for row in rows.values()]


def _renamed(way: DataFiles, row: dict[str, str]) -> RowDict:
    names = dict(way.renamed)
    return {names.get(name, name): value for name, value in row.items()}
