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

WORD_BITS = 32


def pack(values: Tensor, num_bits: int) -> Tensor:
    """The low `num_bits` bits of int32 `values` as int32 words, one-dimensional."""
    flat = values.reshape(-1)
    words = flat.new_zeros(packed_bytes(flat.numel(), num_bits) // 4)
    for part, offset, width in _parts(words, flat.numel(), num_bits):
        scratch = torch.empty_like(part)
        for row, field in enumerate(flat.split(part.numel())):
            bits = scratch[: field.numel()]
            torch.bitwise_right_shift(field, offset, out=bits)
            bits.bitwise_and_(_mask(width)).bitwise_left_shift_(row * width)
            part[: field.numel()].bitwise_or_(bits)
    return words


def put_back_(values: Tensor, words: Tensor, num_bits: int) -> None:
    """The inverse of `pack`: into the low bits, which are 0, of contiguous `values`."""
    flat = values.view(-1)
    for part, offset, width in _parts(words, flat.numel(), num_bits):
        scratch = torch.empty_like(part)
        for row, field in enumerate(flat.split(part.numel())):
            bits = scratch[: field.numel()]
            torch.bitwise_right_shift(part[: field.numel()], row * width, out=bits)
            bits.bitwise_and_(_mask(width)).bitwise_left_shift_(offset)
            field.bitwise_or_(bits)


def _parts(
    words: Tensor, num_values: int, num_bits: int
) -> Iterator[tuple[Tensor, int, int]]:
    """For each width its words, the lowest bit that they hold, and the width."""
    offset = start = 0
    for width in widths(num_bits):
        end = start + -(-num_values // (WORD_BITS // width))
        yield words[start:end], offset, width
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
