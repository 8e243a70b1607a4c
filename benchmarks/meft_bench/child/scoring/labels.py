"""Classifiers: the label with the largest logit, held against the true one."""

from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from meft_bench.child.scoring.examples import Examples
from meft_bench.child.tasks.batches import Example, encode
from meft_bench.child.tasks.task import Task
from meft_bench.child.training import steps
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.cell import Cell


def examples(task: Task, tokenizer: PreTrainedTokenizerBase, cell: Cell) -> Examples:
    """All rows as tokens."""
    train, validation, evaluation = (
        encode(rows, tokenizer, cell.seq_len)
        for rows in (task.train, task.validation, task.evaluation)
    )
    return Examples(train=train, validation=validation, evaluation=evaluation)


def predict(
    stepper: Stepper,
    task: Task,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> list[int]:
    """The label with the largest logit."""
    return steps.predict(stepper, list(rows), cell.batch_size)


def is_right(
    task: Task, predictions: Sequence[int], rows: Sequence[Example]
) -> list[bool]:
    """Whether each label is the true one."""
    return [p == row.label for p, row in zip(predictions, rows, strict=True)]


def scores(
    task: Task, predictions: Sequence[int], rows: Sequence[Example]
) -> dict[str, float]:
    """The metric's values, the score first."""
    labels = [row.label for row in rows if isinstance(row.label, int)]
    return _of(task, predictions, labels)


def majority(task: Task) -> dict[str, float]:
    """For always answering the most frequent label of the training rows."""
    common = Counter(row.label for row in task.train).most_common(1)[0][0]
    references = [row.label for row in task.evaluation]
    return _of(task, [common] * len(references), references)


def _of(
    task: Task, predictions: Sequence[int], references: Sequence[int]
) -> dict[str, float]:
    # Imported here: most cells have no score, and the import costs more than they do.
    from meft_bench.child.tasks import metrics

    assert task.metric is not None
    return metrics.scores(task.metric, predictions, references)
