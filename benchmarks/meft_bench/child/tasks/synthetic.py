"""Random tokens or images of an exact shape: memory and time without data.

Memory and speed do not depend on the values, so these cells measure what real text of
that shape would. There is one fixed batch and nothing to score.

    synthetic      a classifier of two labels
    synthetic-lm   a language model, told every token of the text that it reads
"""

import dataclasses
import random

import torch

from meft_bench.child.tasks.batches import Example, Image
from meft_bench.child.tasks.task import Task
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source


def load(cell: Cell, source: Source) -> Task:
    """A task without rows; its batch is made once the model is known."""
    return _without_rows("synthetic", num_labels=2)


def load_lm(cell: Cell, source: Source) -> Task:
    """Likewise, of a language model, whose logits over the vocabulary take memory."""
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
    """One batch of `cell.batch_size` rows with exactly `cell.seq_len` tokens each."""
    generator = random.Random(cell.seed)
    return [
        Example(
            token_ids=generator.choices(range(vocab_size), k=cell.seq_len),
            segment_ids=[0] * cell.seq_len,
            label=generator.randrange(2),
        )
        for _ in range(cell.batch_size)
    ]


def told_examples(cell: Cell, vocab_size: int) -> list[Example]:
    """The same tokens, each of which is also what is to be learned."""
    rows = examples(cell, vocab_size)
    return [dataclasses.replace(row, label=row.token_ids) for row in rows]


def images(cell: Cell, shape: tuple[int, int, int]) -> list[Image]:
    """One batch of `cell.batch_size` images of noise, `channels height width` each."""
    generator = torch.Generator().manual_seed(cell.seed)
    return [
        Image(
            pixels=torch.randn(shape, generator=generator),
            label=int(torch.randint(2, (), generator=generator)),
        )
        for _ in range(cell.batch_size)
    ]
