"""Classifiers: the label with the largest logit, compared with the true label."""

from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from meft_bench.child.scoring.examples import Examples
from meft_bench.child.tasks import batches
from meft_bench.child.tasks.batches import Example, encode
from meft_bench.child.tasks.task import Row, Task
from meft_bench.child.tasks.token_cache import cached
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
    train, validation, evaluation, mismatched = (
        _encoded([r for r in rows if isinstance(r, Row)], tokenizer, cell.seq_len)
        for rows in (task.train, task.validation, task.evaluation, task.mismatched)
    )
    return Examples(
        train=train,
        validation=validation,
        evaluation=evaluation,
        mismatched=mismatched,
    )


def _encoded(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> list[Example]:
    return cached(
        "labels",
        [(*row.texts, row.label) for row in rows],
        tokenizer,
        seq_len,
        code=[batches.__file__],
        make=lambda: encode(rows, tokenizer, seq_len),
    )


def predict(
    stepper: Stepper,
    task: Task,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> list[int]:
    """Return the label with the largest logit for each row.

    Args:
        stepper: the model.
        task: the task.
        rows: the encoded rows.
        tokenizer: the tokenizer of the model; unused.
        cell: the cell, which includes the batch size.
    """
    return steps.predict(stepper, list(rows), cell.batch_size)


def is_right(
    task: Task, predictions: Sequence[int], rows: Sequence[Example]
) -> list[bool]:
    """Return whether each label is the true one.

    Args:
        task: the task.
        predictions: the labels.
        rows: the encoded rows, in the same order.
    """
    return [p == row.label for p, row in zip(predictions, rows, strict=True)]


def scores(
    task: Task, predictions: Sequence[float], rows: Sequence[Example]
) -> dict[str, float]:
    """Return the metric's values, the score first.

    Args:
        task: the task.
        predictions: the labels.
        rows: the encoded rows, in the same order.
    """
    labels = [row.label for row in rows if not isinstance(row.label, list)]
    return of_values(task, predictions, labels)


def row_scores(
    task: Task, predictions: Sequence[float], rows: Sequence[Example]
) -> list[float] | None:
    """Return what each row contributes to a correlation; None for shares of rows.

    Args:
        task: the task.
        predictions: the labels, or numbers.
        rows: the encoded rows, in the same order.
    """
    from meft_bench.child.tasks import row_scores as of_rows

    labels = [row.label for row in rows if not isinstance(row.label, list)]
    assert task.metric is not None
    return of_rows.row_scores(task.metric, predictions, labels)


def majority(task: Task) -> dict[str, float]:
    """Return the scores of always answering the most frequent training label."""
    common = Counter(row.label for row in task.train).most_common(1)[0][0]
    references = [row.label for row in task.evaluation]
    return of_values(task, [common] * len(references), references)


def of_values(
    task: Task, predictions: Sequence[float], references: Sequence[float]
) -> dict[str, float]:
    """Return the metric's values for predictions and the true values of their rows.

    Args:
        task: the task, which names the metric.
        predictions: labels, or numbers.
        references: the true ones, in the same order.
    """
    # Imported here, because most cells have no score and the import takes longer than
    # they do.
    from meft_bench.child.tasks import metrics

    assert task.metric is not None
    return metrics.scores(task.metric, predictions, references)
