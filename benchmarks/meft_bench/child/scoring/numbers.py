"""Regression: the one output of the head, compared with the true number.

The weights are selected by the first value of the metric. A constant prediction has no
correlation with anything: its score is not-a-number, and so is that of `majority`,
which is the mean of the training rows.
"""

from collections.abc import Sequence
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from meft_bench.child.scoring import labels
from meft_bench.child.scoring.examples import Examples
from meft_bench.child.tasks.batches import Example
from meft_bench.child.tasks.task import Task
from meft_bench.child.training import steps
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.cell import Cell


def examples(task: Task, tokenizer: PreTrainedTokenizerBase, cell: Cell) -> Examples:
    """Return all rows as tokens.

    Args:
        task: the rows.
        tokenizer: the tokenizer of the model.
        cell: the cell, which includes the sequence length.
    """
    return labels.examples(task, tokenizer, cell)


def predict(
    stepper: Stepper,
    task: Task,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> list[float]:
    """Return the output of the head for each row.

    Args:
        stepper: the model.
        task: the task.
        rows: the encoded rows.
        tokenizer: the tokenizer of the model; unused.
        cell: the cell, which includes the batch size.
    """
    found: list[float] = steps.predict(
        stepper, list(rows), cell.batch_size, lambda logits: logits[:, 0].tolist()
    )
    return found


def is_right(task: Task, predictions: Sequence[float], rows: Sequence[Example]) -> None:
    """Return None: a number is not right or wrong, but nearer or farther.

    Args:
        task: the task.
        predictions: the numbers.
        rows: the encoded rows, in the same order.
    """


def scores(
    task: Task, predictions: Sequence[float], rows: Sequence[Example]
) -> dict[str, float]:
    """Return the metric's values, the score first.

    Args:
        task: the task.
        predictions: the numbers.
        rows: the encoded rows, in the same order.
    """
    return labels.scores(task, predictions, rows)


def row_scores(
    task: Task, predictions: Sequence[float], rows: Sequence[Example]
) -> list[float] | None:
    """Return what each row contributes to the score.

    Args:
        task: the task.
        predictions: the numbers.
        rows: the encoded rows, in the same order.
    """
    return labels.row_scores(task, predictions, rows)


def majority(task: Task) -> dict[str, float]:
    """Return the scores of always answering the mean of the training rows."""
    mean = fmean(row.label for row in task.train)
    references = [row.label for row in task.evaluation]
    return labels.of_values(task, [mean] * len(references), references)
