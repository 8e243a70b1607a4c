"""Packing of integers of a few bits into 32-bit words.

k bits are split into fields whose widths are powers of two, so that every width fills
its words: 5 bits become a field of 4 and a field of 1. Field i of word j of a width
belongs to element i W + j, where W is the number of words: whole slices are shifted and
joined without a permutation, and neighbouring threads of a GPU access neighbouring
words. n elements take k n / 8 bytes, plus at most 4 bytes per field where n does not
divide.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

WORD_BITS = 32


def pack(values: Tensor, num_bits: int) -> Tensor:
    """Pack the low `num_bits` bits of integer `values` into a vector of int32 words."""
    flat = values.reshape(-1)
    num_words = packed_bytes(flat.numel(), num_bits) // 4
    words = flat.new_empty(num_words, dtype=torch.int32)
    for part, offset, shifts, mask in _parts(words, flat.numel(), num_bits):
        padding = shifts.numel() * part.numel() - flat.numel()
        padded = functional.pad(flat, (0, padding)) if padding else flat
        fields = padded.view(shifts.numel(), part.numel())
        fields = fields >> offset if offset else fields
        fields = (fields & mask).to(torch.int32).bitwise_left_shift_(shifts)
        # No two rows share a bit, so their sum is their bitwise OR.
        torch.sum(fields, 0, dtype=torch.int32, out=part)
    return words


def put_back_(values: Tensor, words: Tensor, num_bits: int) -> None:
    """Write the bits that `pack` returned into the low bits of `values`.

    Args:
        values: contiguous integers whose low `num_bits` bits are 0.
        words: what `pack` returned.
        num_bits: the number of bits per value.
    """
    flat = values.view(-1)
    for part, offset, shifts, mask in _parts(words, flat.numel(), num_bits):
        fields = (part >> shifts).bitwise_and_(mask)
        if offset:
            fields.bitwise_left_shift_(offset)
        flat.bitwise_or_(fields.view(-1)[: flat.numel()])


def _parts(
    words: Tensor, num_values: int, num_bits: int
) -> Iterator[tuple[Tensor, int, Tensor, int]]:
    """Yield the layout of each width.

    It consists of the width's words, the lowest bit of a value that they hold, the
    shift of each field in a word as a column, and the bit mask of one field.
    """
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
    """Return the number of bytes that `pack` takes for `num_values` values."""
    fields = (WORD_BITS // width for width in widths(num_bits))
    return sum(4 * -(-num_values // per_word) for per_word in fields)


def widths(num_bits: int) -> list[int]:
    """Return the powers of two that sum to `num_bits`, greatest first."""
    return [1 << i for i in reversed(range(6)) if num_bits >> i & 1]


def _mask(width: int) -> int:
    """Return an int32 mask of `width` ones; for 32 bits that is -1."""
    return (1 << width) - 1 if width < WORD_BITS else -1
