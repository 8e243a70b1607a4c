"""Packing: integers of a few bits, side by side in 32-bit words.

k bits are split into fields whose widths are powers of two, so that every width fills
its words: 5 bits are one of 4 and one of 1. Field i of word j of a width belongs to
element i W + j, W words in all: whole slices are shifted and joined, none is shuffled,
and neighbouring threads of a GPU touch neighbouring words. n elements take k n / 8
bytes, plus at most 4 bytes a field where n does not divide.
"""

import torch
from torch import Tensor
from torch.nn import functional

WORD_BITS = 32


def pack(values: Tensor, num_bits: int) -> Tensor:
    """The low `num_bits` bits of int32 `values` as int32 words, one-dimensional."""
    flat = values.reshape(-1)
    words = []
    offset = 0
    for width in widths(num_bits):
        per_word = WORD_BITS // width
        num_words = -(-flat.numel() // per_word)
        padding = num_words * per_word - flat.numel()
        padded = functional.pad(flat, (0, padding)) if padding else flat
        mask = _mask(width)
        joined = padded.new_zeros(num_words)
        for row, field in enumerate(padded.view(per_word, num_words)):
            joined |= (field >> offset).bitwise_and_(mask) << (row * width)
        words.append(joined)
        offset += width
    return words[0] if len(words) == 1 else torch.cat(words)


def unpack(words: Tensor, num_bits: int, num_values: int) -> Tensor:
    """The inverse of `pack`: int32, one-dimensional."""
    values: Tensor | None = None
    offset, start = 0, 0
    for width in widths(num_bits):
        per_word = WORD_BITS // width
        num_words = -(-num_values // per_word)
        part = words[start : start + num_words]
        fields = part.new_empty(per_word, num_words)
        for row, field in enumerate(fields):
            torch.bitwise_right_shift(part, row * width, out=field)
        fields.bitwise_and_(_mask(width)).bitwise_left_shift_(offset)
        flat = fields.view(-1)[:num_values]
        values = flat if values is None else values.bitwise_or_(flat)
        offset += width
        start += num_words
    assert values is not None, "at least one bit"
    return values


def packed_bytes(num_values: int, num_bits: int) -> int:
    """Bytes that `pack` takes for so many values."""
    fields = (WORD_BITS // width for width in widths(num_bits))
    return sum(4 * -(-num_values // per_word) for per_word in fields)


def widths(num_bits: int) -> list[int]:
    """The powers of two that make up `num_bits`, greatest first."""
    return [1 << i for i in reversed(range(6)) if num_bits >> i & 1]


def _mask(width: int) -> int:
    """`width` ones, as an int32: of all 32 bits that is -1."""
    return (1 << width) - 1 if width < WORD_BITS else -1
