"""The guard: what training does to the perplexity of text that it is not about.

    guard_ratio = perplexity after training / perplexity before

of the first articles of BBC News (`bbc-news`), cut to `NUM_TOKENS` tokens. A model that
learns facts and forgets its language has a ratio above 1.
"""

import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from meft_bench.child.scoring import tokens
from meft_bench.child.tasks.batches import Example
from meft_bench.child.tasks.find import find
from meft_bench.child.tasks.task import Row
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source
from meft_bench.shared.tasks import TABLE

NUM_TOKENS = 128
"""Number of tokens of each text, from its beginning; shorter texts are left out."""


def texts(
    cell: Cell, source: Source, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """Return `cell.guard_texts` texts as rows of `NUM_TOKENS` tokens.

    Args:
        cell: the cell.
        source: where the texts may come from.
        tokenizer: the tokenizer of the model.

    Raises:
        MissingError: the texts are not available.
        ValueError: there are not so many.
    """
    articles = find(TABLE["bbc-news"], source).rows.evaluation
    encoded = (
        tokens.encode([Row((row["text"],), 0)], tokenizer, NUM_TOKENS)
        for row in articles
    )
    found = [rows[0] for rows in encoded if len(rows[0].token_ids) == NUM_TOKENS]
    if len(found) < cell.guard_texts:
        raise ValueError(
            f"`guard_texts` is {cell.guard_texts}, and there are {len(found)} texts of "
            f"{NUM_TOKENS} tokens: lower it"
        )
    return found[: cell.guard_texts]


def perplexity(stepper: Stepper, rows: Sequence[Example], cell: Cell) -> float:
    """Return exp of the mean loss of a token.

    Args:
        stepper: the model.
        rows: the encoded texts.
        cell: the cell, which includes the batch size.
    """
    losses = tokens.losses(stepper, rows, cell.batch_size)
    total = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    return math.exp(min(total, tokens.LARGEST_EXPONENT))
