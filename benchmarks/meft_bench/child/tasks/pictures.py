"""Tasks of classifiers of images, from the rows that were found.

Rows to train with are drawn by the seed, and those to score with are the first.
"""

import torch

from meft_bench.child.tasks.find import find
from meft_bench.child.tasks.labelled import label_of
from meft_bench.child.tasks.task import Picture, Task, draw, first
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source
from meft_bench.shared.tasks import TABLE


def load(cell: Cell, source: Source) -> Task:
    """Load the task that `cell` names.

    Args:
        cell: the cell, with the numbers of rows and the seed.
        source: where the rows may come from.

    Raises:
        MissingError: the rows are not available.
        ValueError: a label is none of the task.
    """
    facts = TABLE[cell.task]
    found = find(facts, source)
    learned, scored = (
        [Picture(torch.tensor(row["image"]), int(label_of(facts, row))) for row in rows]
        for rows in (found.rows.train, found.rows.evaluation)
    )
    train, validation = draw(learned, cell)
    evaluation = first(scored, cell)
    return Task(
        name=facts.name,
        num_labels=len(facts.labels),
        train=train,
        validation=validation,
        evaluation=evaluation,
        metric=facts.metric,
        origin=found.origin(len(train), len(validation), len(evaluation)),
    )
