"""Classifiers: the label with the largest logit, held against the true one."""

from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from meft_bench.cell import Cell
from meft_bench.scoring.examples import Examples
from meft_bench.tasks.batches import Example, encode
from meft_bench.tasks.task import Task
from meft_bench.training import Stepper, predict


def examples(task: Task, tokenizer: PreTrainedTokenizerBase, cell: Cell) -> Examples:
    """All rows as tokens."""
    train, validation, evaluation = (
        encode(rows, tokenizer, cell.seq_len)
        for rows in (task.train, task.validation, task.evaluation)
    )
    return Examples(train=train, validation=validation, evaluation=evaluation)


def scores(
    stepper: Stepper,
    task: Task,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> dict[str, float]:
    """The metric's values, the score first."""
    labels = predict(stepper, list(rows), cell.batch_size)
    return _of(task, labels, [row.label for row in rows if isinstance(row.label, int)])


def majority(task: Task) -> dict[str, float]:
    """For always answering the most frequent label of the training rows."""
    common = Counter(row.label for row in task.train).most_common(1)[0][0]
    references = [row.label for row in task.evaluation]
    return _of(task, [common] * len(references), references)


def _of(
    task: Task, predictions: Sequence[int], references: Sequence[int]
) -> dict[str, float]:
    # Imported here: most cells have no score, and the import costs more than they do.
    from meft_bench.tasks import metrics

    assert task.metric is not None
    return metrics.scores(task.metric, predictions, references)
