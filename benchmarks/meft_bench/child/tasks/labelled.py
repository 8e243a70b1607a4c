"""Tasks of classifiers and regressions of texts, from the rows that were found.

Rows to train with are drawn by the seed, and those to score with are the first.
"""

from meft_bench.child.tasks.find import find
from meft_bench.child.tasks.rows import RowDict
from meft_bench.child.tasks.task import Row, Task, draw, first
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source
from meft_bench.shared.tasks import TABLE
from meft_bench.shared.tasks.facts import NUMBER, Facts


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
    learned, scored, mismatched = (
        [Row(_texts(facts, row), label_of(facts, row)) for row in rows]
        for rows in (found.rows.train, found.rows.evaluation, found.rows.mismatched)
    )
    train, validation = draw(learned, cell)
    evaluation = first(scored, cell)
    others = first(mismatched, cell)
    return Task(
        name=facts.name,
        num_labels=1 if facts.kind == NUMBER else len(facts.labels),
        train=train,
        validation=validation,
        evaluation=evaluation,
        mismatched=others,
        metric=facts.metric,
        origin=found.origin(len(train), len(validation), len(evaluation), len(others)),
    )


def _texts(facts: Facts, row: RowDict) -> tuple[str, ...]:
    return tuple(row[field] for field in facts.fields)


def label_of(facts: Facts, row: RowDict) -> int | float:
    """Return the index of the class of a row, or its number.

    Args:
        facts: the facts of the task, which names the classes.
        row: a row as it was read.

    Raises:
        ValueError: the class is none of the task, or the text is no number.
    """
    label = row["label"]
    if facts.kind == NUMBER:
        return float(label)
    if isinstance(label, str) and label in facts.labels:
        return facts.labels.index(label)
    if isinstance(label, int) and 0 <= label < len(facts.labels):
        return label
    raise ValueError(
        f"{facts.title}: label {label!r}, expected one of {facts.labels} or its index"
    )
