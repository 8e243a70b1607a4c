"""Regression: the number that a model predicts, compared with the true one.

    pearson    Pearson's correlation of predictions and true numbers, the score
    spearman   Spearman's, of their ranks

Both are 0 where all predictions are equal. A row is neither right nor wrong.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from meft_bench.child.own import metric as own_metric
from meft_bench.child.scoring.labels import examples
from meft_bench.child.tasks.batches import Example
from meft_bench.child.tasks.task import Task
from meft_bench.child.training import steps
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.cell import Cell

__all__ = ["examples", "is_right", "majority", "predict", "scores"]


def predict(
    stepper: Stepper,
    task: Task,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> list[float]:
    """Return the only output of the model for each row.

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


def is_right(
    task: Task, predictions: Sequence[float], rows: Sequence[Example]
) -> list[bool]:
    """Return nothing: a number is not right or wrong.

    Args:
        task: the task.
        predictions: the numbers.
        rows: the encoded rows, in the same order.
    """
    return []


def scores(
    task: Task, predictions: Sequence[float], rows: Sequence[Example]
) -> dict[str, float]:
    """Return the metric's values, the score first.

    Args:
        task: the task.
        predictions: the numbers.
        rows: the encoded rows, in the same order.
    """
    labels = [row.label for row in rows if not isinstance(row.label, list)]
    return _of(task, predictions, labels)


def majority(task: Task) -> dict[str, float]:
    """Return the scores of always answering the mean of the training labels."""
    mean = sum(row.label for row in task.train) / len(task.train)
    references = [row.label for row in task.evaluation]
    return _of(task, [mean] * len(references), references)


def _of(
    task: Task, predictions: Sequence[float], references: Sequence[float]
) -> dict[str, float]:
    assert task.metric is not None
    if own_metric.is_own(task.metric):
        return own_metric.scores(task.metric, predictions, references)
    if len(set(predictions)) < 2 or len(set(references)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    # Imported here, because the import takes longer than most cells.
    from scipy import stats

    return {
        "pearson": float(stats.pearsonr(predictions, references).statistic),
        "spearman": float(stats.spearmanr(predictions, references).statistic),
    }
