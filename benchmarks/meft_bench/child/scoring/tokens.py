"""Language modelling: how likely the true tokens are.

    log_likelihood_per_token   mean log-probability of a token, the score
    perplexity                 exp of its negative

A text longer than a row is cut into rows one after another, so that no token is lost;
the first token of a row has nothing before it and is no target.
"""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from meft_bench.child.scoring.examples import Examples
from meft_bench.child.tasks.batches import IGNORED, Example, collate
from meft_bench.child.tasks.task import Row, Task
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.cell import Cell

LARGEST_EXPONENT = 700.0
"""Largest power of e that is a finite number, about."""


def examples(task: Task, tokenizer: PreTrainedTokenizerBase, cell: Cell) -> Examples:
    """Return all texts as rows of tokens.

    Args:
        task: the texts.
        tokenizer: the tokenizer of the model.
        cell: the cell, which includes the sequence length.
    """
    train, validation, evaluation = (
        encode([r for r in rows if isinstance(r, Row)], tokenizer, cell.seq_len)
        for rows in (task.train, task.validation, task.evaluation)
    )
    return Examples(train=train, validation=validation, evaluation=evaluation)


def predict(
    stepper: Stepper,
    task: Task,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> list[tuple[float, int]]:
    """Return the sum of the losses of the tokens of each batch, and their number.

    Args:
        stepper: the model.
        task: the task.
        rows: the encoded rows.
        tokenizer: the tokenizer of the model; unused.
        cell: the cell, which includes the batch size.
    """
    return losses(stepper, rows, cell.batch_size)


@torch.no_grad()
def losses(
    stepper: Stepper, rows: Sequence[Example], batch_size: int
) -> list[tuple[float, int]]:
    """Return the sum of the losses of the tokens of each batch, and their number.

    Args:
        stepper: the model.
        rows: the encoded rows.
        batch_size: number of rows of a batch.
    """
    stepper.model.eval()
    found = []
    order = sorted(rows, key=lambda row: len(row.token_ids))
    for start in range(0, len(order), batch_size):
        batch = collate(order[start : start + batch_size], stepper.pad_token_id)
        count = int(batch["labels"][:, 1:].ne(IGNORED).sum())
        loss = float(stepper.loss(stepper.to_device(batch)))
        found.append((loss * count, count))
    return found


def is_right(
    task: Task, predictions: Sequence[tuple[float, int]], rows: Sequence[Example]
) -> None:
    """Return None: a text is not right or wrong.

    Args:
        task: the task.
        predictions: losses and numbers of tokens.
        rows: the encoded rows.
    """


def scores(
    task: Task, predictions: Sequence[tuple[float, int]], rows: Sequence[Example]
) -> dict[str, float]:
    """Return the mean log-likelihood of a token, and the perplexity.

    Args:
        task: the task.
        predictions: losses and numbers of tokens.
        rows: the encoded rows.
    """
    loss = sum(one for one, _ in predictions) / sum(count for _, count in predictions)
    return {
        "log_likelihood_per_token": -loss,
        "perplexity": math.exp(min(loss, LARGEST_EXPONENT)),
    }


def row_scores(
    task: Task, predictions: Sequence[tuple[float, int]], rows: Sequence[Example]
) -> None:
    """Return None: losses are summed by batch, not by row.

    Args:
        task: the task.
        predictions: losses and numbers of tokens.
        rows: the encoded rows.
    """


def majority(task: Task) -> dict[str, float]:
    """Return not-a-number: no constant answer is a text."""
    return dict.fromkeys(("log_likelihood_per_token", "perplexity"), math.nan)


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> list[Example]:
    """Return texts as rows of at most `seq_len` tokens, one after another.

    Args:
        rows: the texts.
        tokenizer: the tokenizer of the model.
        seq_len: maximum number of tokens of a row.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    for row in rows:
        ids: list[int] = tokenizer(row.texts[0])["input_ids"]
        tokens = ids if ids[-1:] == end else [*ids, *end]
        for start in range(0, len(tokens), seq_len):
            part = tokens[start : start + seq_len]
            if len(part) > 1:
                found.append(
                    Example(token_ids=part, segment_ids=[0] * len(part), label=part)
                )
    return found
