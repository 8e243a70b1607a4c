"""Recall of random tokens: how many facts a model knows by heart.

    exact_recall     share of facts whose tokens are all right, the score
    token_accuracy   share of tokens that are right
    share_of_bits    1 - loss / log(num_symbols), at least 0: share of the bits of a
                     fact that the model has, also where its guess is not right

A token is right if it is the most likely one after the prompt and the *true* tokens
before it. Greedy generation from the prompt writes all tokens of a fact if and only if
all are right: as long as it writes true tokens, it reads the true tokens before. So
`exact_recall` is that of generation, from one forward of each fact.

A symbol is a token of the model's vocabulary: a fixed draw of as many as there are
symbols, the same for every model with that vocabulary, without special tokens.
"""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from meft_bench.child.scoring.examples import Examples
from meft_bench.child.tasks.batches import IGNORED, Example, collate
from meft_bench.child.tasks.recall import Fact, RecallTask
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.cell import Cell

_ALPHABET_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recalled:
    """What a model knows of one fact."""

    num_right: int
    """Number of tokens that are right."""
    loss: float
    """Mean negative log-likelihood of a token, in nats."""


@functools.cache
def alphabet(tokenizer: PreTrainedTokenizerBase, num_symbols: int) -> tuple[int, ...]:
    """Return the token of each symbol.

    Args:
        tokenizer: the tokenizer of the model.
        num_symbols: number of symbols.

    Raises:
        ValueError: the vocabulary is too small.
    """
    special = set(tokenizer.all_special_ids)
    usual = [n for n in range(tokenizer.vocab_size) if n not in special]
    if len(usual) < num_symbols:
        raise ValueError(
            f"facts are of {num_symbols} symbols, and the tokenizer has {len(usual)} "
            "tokens that are not special: take a backbone with a larger vocabulary"
        )
    return tuple(random.Random(_ALPHABET_SEED).sample(usual, num_symbols))


def examples(
    task: RecallTask, tokenizer: PreTrainedTokenizerBase, cell: Cell
) -> Examples:
    """Return facts as rows of tokens, of which the symbols are learned.

    Args:
        task: the facts.
        tokenizer: the tokenizer of the model.
        cell: the cell, which includes the sequence length.

    Raises:
        ValueError: a fact does not fit into `cell.seq_len` tokens.
    """
    train, validation, evaluation = (
        _encode(rows, task, tokenizer, cell.seq_len)
        for rows in (task.train, task.validation, task.evaluation)
    )
    return Examples(train=train, validation=validation, evaluation=evaluation)


@torch.no_grad()
def predict(
    stepper: Stepper,
    task: RecallTask,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> list[Recalled]:
    """Return what the model knows of each fact.

    Args:
        stepper: the model.
        task: the task.
        rows: the encoded facts.
        tokenizer: the tokenizer of the model; unused.
        cell: the cell, which includes the batch size.
    """
    stepper.model.eval()
    order = sorted(range(len(rows)), key=lambda n: len(rows[n].token_ids))
    found: dict[int, Recalled] = {}
    for start in range(0, len(order), cell.batch_size):
        chosen = order[start : start + cell.batch_size]
        batch = collate([rows[n] for n in chosen], stepper.pad_token_id)
        targets = batch.pop("labels")[:, 1:]
        counts = targets != IGNORED
        places = counts.any(0).nonzero()[:, 0]
        targets, counts = targets[:, places], counts[:, places]
        logits = stepper.logits_at(batch, places).float().cpu()
        likely = logits.log_softmax(-1)
        losses = -likely.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        right = (logits.argmax(-1) == targets) & counts
        mean = (losses * counts).sum(1) / counts.sum(1)
        for n, num_right, loss in zip(
            chosen, right.sum(1).tolist(), mean.tolist(), strict=True
        ):
            found[n] = Recalled(num_right=num_right, loss=loss)
    return [found[n] for n in range(len(rows))]


def is_right(
    task: RecallTask, predictions: Sequence[Recalled], rows: Sequence[Example]
) -> list[bool]:
    """Return whether each fact is recalled whole.

    Args:
        task: the task.
        predictions: what the model knows of each fact.
        rows: the encoded facts, in the same order.
    """
    return [
        one.num_right == _num_targets(row)
        for one, row in zip(predictions, rows, strict=True)
    ]


def scores(
    task: RecallTask, predictions: Sequence[Recalled], rows: Sequence[Example]
) -> dict[str, float]:
    """Return exact recall, the accuracy of tokens and the share of bits.

    Args:
        task: the task.
        predictions: what the model knows of each fact.
        rows: the encoded facts, in the same order.
    """
    num_targets = [_num_targets(row) for row in rows]
    total = sum(num_targets)
    losses = sum(
        one.loss * count for one, count in zip(predictions, num_targets, strict=True)
    )
    share = 1 - losses / total / math.log(task.num_symbols)
    return {
        "exact_recall": sum(is_right(task, predictions, rows)) / len(rows),
        "token_accuracy": sum(one.num_right for one in predictions) / total,
        "share_of_bits": max(0.0, share) if math.isfinite(share) else math.nan,
    }


def recalled_bits(
    task: RecallTask, predictions: Sequence[Recalled], rows: Sequence[Example]
) -> int:
    """Return the number of bits of the facts that are recalled whole.

    Args:
        task: the task.
        predictions: what the model knows of each fact.
        rows: the encoded facts, in the same order.
    """
    right = is_right(task, predictions, rows)
    symbols = sum(
        len(f.symbols) for f, r in zip(task.evaluation, right, strict=True) if r
    )
    return round(symbols * math.log2(task.num_symbols))


def row_scores(
    task: RecallTask, predictions: Sequence[Recalled], rows: Sequence[Example]
) -> None:
    """Return None: the score is a share of recalled facts.

    Args:
        task: the task.
        predictions: what the model knows of each fact.
        rows: the encoded facts.
    """


def majority(task: RecallTask) -> dict[str, float]:
    """Return the scores of always giving the symbols of the first fact."""
    answer = task.train[0].symbols
    matches = [
        [a == b for a, b in zip(answer, fact.symbols, strict=True)]
        for fact in task.evaluation
    ]
    num_symbols = sum(len(match) for match in matches)
    return {
        "exact_recall": sum(map(all, matches)) / len(matches),
        "token_accuracy": sum(map(sum, matches)) / num_symbols,
        "share_of_bits": 0.0,
    }


def _num_targets(row: Example) -> int:
    assert isinstance(row.label, list)
    return sum(token != IGNORED for token in row.label)


def _encode(
    facts: Sequence[Fact],
    task: RecallTask,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
) -> list[Example]:
    if not facts:
        return []
    tokens = alphabet(tokenizer, task.num_symbols)
    prompts = tokenizer([fact.prompt for fact in facts])["input_ids"]
    found = []
    for prompt, fact in zip(prompts, facts, strict=True):
        answer = [tokens[symbol] for symbol in fact.symbols]
        ids = [*prompt, *answer]
        if len(ids) > seq_len:
            raise ValueError(
                f"`seq_len` is {seq_len}, but a fact of task {task.name!r} has "
                f"{len(ids)} tokens: set it to {len(ids)} or more"
            )
        found.append(
            Example(
                token_ids=ids,
                segment_ids=[0] * len(ids),
                label=[*[IGNORED] * len(prompt), *answer],
            )
        )
    return found
