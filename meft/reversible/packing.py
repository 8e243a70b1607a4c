"""Packing: integers of a few bits, side by side in 32-bit words.

k bits are split into fields whose widths are powers of two, so that every width fills
its words: 5 bits are one of 4 and one of 1. Field i of word j of a width belongs to
element i W + j, W words in all: whole slices are shifted and joined, none is shuffled,
and neighbouring threads of a GPU touch neighbouring words. n elements take k n / 8
bytes, plus at most 4 bytes a field where n does not divide.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

WORD_BITS = 32


def pack(values: Tensor, num_bits: int) -> Tensor:
    """The low `num_bits` bits of integer `values` as int32 words, one-dimensional."""
    flat = values.reshape(-1)
    num_words = packed_bytes(flat.numel(), num_bits) // 4
    words = flat.new_empty(num_words, dtype=torch.int32)
    for part, offset, shifts, mask in _parts(words, flat.numel(), num_bits):
        padding = shifts.numel() * part.numel() - flat.numel()
        padded = functional.pad(flat, (0, padding)) if padding else flat
        fields = padded.view(shifts.numel(), part.numel())
        fields = fields >> offset if offset else fields
        fields = (fields & mask).to(torch.int32).bitwise_left_shift_(shifts)
        # No two rows share a bit: their sum is all of them side by side.
        torch.sum(fields, 0, dtype=torch.int32, out=part)
    return words


def put_back_(values: Tensor, words: Tensor, num_bits: int) -> None:
    """The inverse of `pack`: into the low bits, which are 0, of contiguous `values`."""
    flat = values.view(-1)
    for part, offset, shifts, mask in _parts(words, flat.numel(), num_bits):
        fields = (part >> shifts).bitwise_and_(mask)
        if offset:
            fields.bitwise_left_shift_(offset)
        flat.bitwise_or_(fields.view(-1)[: flat.numel()])


def _parts(
    words: Tensor, num_values: int, num_bits: int
) -> Iterator[tuple[Tensor, int, Tensor, int]]:
    """For each width: its words, the lowest bit of a value that they hold, the place of
    each field in a word as a column, and the bits of one field."""
    offset = start = 0
    for width in widths(num_bits):
        shifts = torch.arange(
            0, WORD_BITS, width, dtype=torch.int32, device=words.device
        ).unsqueeze(1)
        end = start + -(-num_values // shifts.numel())
        yield words[start:end], offset, shifts, _mask(width)
        offset += width
        start = end


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
