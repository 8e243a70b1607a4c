"""Random tokens or images of an exact shape: memory and time without data.

Memory and speed do not depend on the values, so these cells measure the same as real
text of that shape. There is one fixed batch and no score.

    synthetic      a classifier of two labels
    synthetic-lm   a language model, for which every token of its text is a target
"""

import dataclasses
import random

import torch

from meft_bench.child.tasks.batches import Example, Image
from meft_bench.child.tasks.task import Task
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source


def load(cell: Cell, source: Source) -> Task:
    """Load a task without rows; its batch is made once the model is known."""
    return _without_rows("synthetic", num_labels=2)


def load_lm(cell: Cell, source: Source) -> Task:
    """Load the same for a language model; logits over the vocabulary need memory."""
    return _without_rows("synthetic-lm", num_labels=None)


def _without_rows(name: str, num_labels: int | None) -> Task:
    return Task(
        name=name,
        num_labels=num_labels,
        train=(),
        validation=(),
        evaluation=(),
        metric=None,
        origin="random input",
    )


def examples(cell: Cell, vocab_size: int) -> list[Example]:
    """Return one batch: `cell.batch_size` rows of exactly `cell.seq_len` tokens.

    With padding, the last row has one token less.
    """
    generator = random.Random(cell.seed)
    found = [
        Example(
            token_ids=generator.choices(range(vocab_size), k=cell.seq_len),
            segment_ids=[0] * cell.seq_len,
            label=generator.randrange(2),
        )
        for _ in range(cell.batch_size)
    ]
    if cell.padding == "some":
        last = found[-1]
        found[-1] = dataclasses.replace(
            last, token_ids=last.token_ids[:-1], segment_ids=last.segment_ids[:-1]
        )
    return found


def causal_lm_examples(cell: Cell, vocab_size: int) -> list[Example]:
    """Return the same rows with every token as its own target."""
    rows = examples(cell, vocab_size)
    return [dataclasses.replace(row, label=row.token_ids) for row in rows]


def images(cell: Cell, shape: tuple[int, int, int]) -> list[Image]:
    """Return one batch: `cell.batch_size` images of noise, `channels height width`."""
    generator = torch.Generator().manual_seed(cell.seed)
    return [
        Image(
            pixels=torch.randn(shape, generator=generator),
            label=int(torch.randint(2, (), generator=generator)),
        )
        for _ in range(cell.batch_size)
    ]
