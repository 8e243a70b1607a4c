"""Conversion of rows of text, or images, to batches of tensors.

rows --encode--> examples --epochs--> lists of examples --collate--> batch
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from meft_bench.child.tasks.task import Row
from meft_bench.shared.cell import Cell

Batch = dict[str, Tensor]
"""The tensors of one batch by name.

For text: `input_ids`, `token_type_ids`, `attention_mask`: `batch seq`; `labels`:
`batch`, floats for a regression, or `batch seq` for a language model. `training`
removes those that a model does not accept. For images: `pixel_values`: `batch channels
height width`, and `labels`.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row as the model reads it."""

    token_ids: list[int]
    segment_ids: list[int]
    """0 for the first text of a pair, 1 for the second."""
    label: int | float | list[int]
    """The label of the row, its class or its number.

    For a language model, the target token at each position, which is `IGNORED` where
    nothing is learned.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelForm:
    """The images that a model reads, to which gray images are converted."""

    shape: tuple[int, int, int]
    """`channels height width`."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from values between 0 and 1, one number or one for each channel."""
    std: tuple[float, ...] = (0.5,)
    """The difference is divided by these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """One image, which is converted to the form of the model in its batch."""

    pixels: Tensor
    """Values as the model reads them, `channels height width`.

    With a form, gray values from 0 to 255, `height width`.
    """
    label: int
    form: PixelForm | None = None


AnyExample = TypeVar("AnyExample", bound=Example | Image)

IGNORED = -100
"""Label that transformers' losses ignore."""


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> list[Example]:
    """Tokenise rows, cutting the longer text first until a row has `seq_len` tokens.

    Where the tokenizer puts nothing between the texts of a pair, as LLaMA's, a newline
    is inserted, with the segment of the first text.

    Args:
        rows: the texts and labels.
        tokenizer: the tokenizer of the model.
        seq_len: maximum number of tokens of a row.
    """
    if not rows:
        return []
    between = _separator(tokenizer) if len(rows[0].texts) > 1 else []
    encoded = tokenizer(
        *(list(texts) for texts in zip(*(row.texts for row in rows), strict=True)),
        truncation=True,
        max_length=seq_len - len(between),
        padding=False,
        return_token_type_ids=True,
    )
    examples = []
    for index, row in enumerate(rows):
        token_ids, segment_ids = (
            encoded[name][index] for name in ("input_ids", "token_type_ids")
        )
        if between:
            # Not by the segments, which are 0 throughout for some tokenizers.
            texts = encoded.sequence_ids(index)
            end = texts.index(1) if 1 in texts else len(texts)
            token_ids = [*token_ids[:end], *between, *token_ids[end:]]
            segment_ids = [*segment_ids[:end], *[0] * len(between), *segment_ids[end:]]
        examples.append(
            Example(token_ids=token_ids, segment_ids=segment_ids, label=row.label)
        )
    return examples


def _separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return tokens to put between two texts; empty if the tokenizer adds its own."""
    added = tokenizer.num_special_tokens_to_add
    if added(pair=True) > added(pair=False):
        return []
    newline: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return newline


def epochs(examples: Sequence[AnyExample], cell: Cell) -> Iterator[list[AnyExample]]:
    """Yield batches of `cell.batch_size` rows without end, each epoch in a new order.

    A batch may contain rows of two epochs, so that every step does the same work.
    """
    generator = random.Random(cell.seed)
    orders = (generator.sample(examples, len(examples)) for _ in itertools.count())
    stream = itertools.chain.from_iterable(orders)
    while True:
        yield list(itertools.islice(stream, cell.batch_size))


def collate(rows: Sequence[Example | Image], pad_token_id: int) -> Batch:
    """Return one batch of text or images; text is padded on the right.

    Args:
        rows: the examples of the batch.
        pad_token_id: padding up to the longest example.
    """
    images = [row for row in rows if isinstance(row, Image)]
    if images:
        return {
            "pixel_values": _pixel_values(images),
            "labels": torch.tensor([image.label for image in images]),
        }
    examples = [row for row in rows if isinstance(row, Example)]
    longest = max(len(example.token_ids) for example in examples)

    def padded(sequence: list[int], value: int) -> list[int]:
        return sequence + [value] * (longest - len(sequence))

    columns = {
        "input_ids": [padded(e.token_ids, pad_token_id) for e in examples],
        "token_type_ids": [padded(e.segment_ids, 0) for e in examples],
        "attention_mask": [padded([1] * len(e.token_ids), 0) for e in examples],
        "labels": [
            padded(e.label, IGNORED) if isinstance(e.label, list) else e.label
            for e in examples
        ],
    }
    return {name: torch.tensor(values) for name, values in columns.items()}


def _pixel_values(images: Sequence[Image]) -> Tensor:
    """Return the images of a batch as the model reads them.

    Images of a set need much less memory before, as bytes and in their own size.
    """
    pixels = torch.stack([image.pixels for image in images])
    form = images[0].form
    if form is None:
        return pixels
    channels, *size = form.shape
    resized = functional.interpolate(
        pixels[:, None].float() / 255, size, mode="bilinear", antialias=True
    )
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (form.mean, form.std)
    )
    return (resized.expand(-1, channels, -1, -1) - mean) / std


def other_steps(rows: Sequence[Example | Image], cell: Cell) -> Iterator[list[Batch]]:
    """Iterate over the batches of further steps of the same size, without end.

    Each begins with other rows, an eighth of all further on.
    """
    for step in itertools.count(1):
        first = step * max(len(rows) // 8, 1) % len(rows)
        yield full_batches([*rows[first:], *rows[:first]], cell)


def full_batches(rows: Sequence[Example | Image], cell: Cell) -> list[Batch]:
    """Return the batches of the largest step: all rows have `cell.seq_len` tokens.

    Rows are filled with the tokens of as many examples as needed, one after another;
    for a language model, every token is a target, but for padding. Images have a fixed
    size.

    Raises:
        ValueError: images should have padding.
    """
    images = [row for row in rows if isinstance(row, Image)]
    if images:
        refuse_padded_images(cell)
        stream = itertools.cycle(images)
        return [
            collate([*itertools.islice(stream, cell.batch_size)], pad_token_id=0)
            for _ in range(cell.accumulation)
        ]
    examples = [row for row in rows if isinstance(row, Example)]
    shape = (cell.batch_size, cell.seq_len)
    tokens = itertools.chain.from_iterable(
        e.token_ids for e in itertools.cycle(examples)
    )
    labels = (e.label for e in itertools.cycle(examples))
    batches = []
    for _ in range(cell.accumulation):
        ids = torch.tensor([*itertools.islice(tokens, shape[0] * shape[1])]).view(shape)
        targets = [*itertools.islice(labels, cell.batch_size)]
        is_list = isinstance(targets[0], list)
        batches.append(
            {
                "input_ids": ids,
                "token_type_ids": torch.zeros(shape, dtype=torch.long),
                "attention_mask": torch.ones(shape, dtype=torch.long),
                "labels": ids.clone() if is_list else torch.tensor(targets),
            }
        )
        if cell.padding == "some":
            batches[-1]["attention_mask"][-1, -1] = 0
            if is_list:
                batches[-1]["labels"][-1, -1] = IGNORED
    return batches


def refuse_padded_images(cell: Cell) -> None:
    """Raise `ValueError` for a cell of images whose batches should have padding."""
    if cell.padding != "none":
        raise ValueError(
            f"`padding` is {cell.padding!r}, but {cell.backbone} reads no text, and "
            "images and audio have none: leave it out"
        )
