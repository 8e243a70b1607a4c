"""The couplings of `fixed` on a GPU: each way reads and writes every number once.

    couple:    d = t [- s];  keep d & (2^k - 1);  t <- (d >> k) + Q(value)
    uncouple:  t <- (((t - Q(value)) << k) | kept) [+ s]

Bit for bit what `Fixed` computes with a dozen operations of torch, which stay the
reference, and what is kept has the layout of `packing`: either side undoes the other.
One program takes a block of words, and with them the elements i W + j of all their
fields, so it neither shares a word nor a number with another program.

That is one launch where k is a power of two, or 0, or nothing is kept. Otherwise the
words of each width are a layout of their own, and each takes a launch: coupling, all
but the last only look; uncoupling, each adds its bits. Bytes moved per element, with v
those of one number of `value`, and those in brackets if the coupling has a difference:

    one launch      either way    8 + v + k/8 [+ 4]
    two launches    couple       12 + v + k/8 [+ 8]
                    uncouple     16 + v + k/8 [+ 4]

For k = 4 and 16-bit values that is 10.5 [14.5]; one operation of torch after the other
moves about 110 [120]. Streams of 64 bits move twice the 8, 12, 16 and what is in
brackets.

This module needs triton, so nothing but `fixed.kernels` imports it.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from meft.reversible.fixed import LIMITS
from meft.reversible.packing import WORD_BITS, packed_bytes, widths

BLOCK = 512
"""Words of one program: four for every thread of the four warps that triton takes."""


def couple_(
    target: Tensor,
    source: Tensor,
    value: Tensor,
    num_bits: int,
    difference: bool,
    fraction_bits: int,
    keep: bool,
) -> Tensor | None:
    """`target` one coupling on, in place; the bits shifted out, if to `keep`."""
    num_values = target.numel()
    num_words = packed_bytes(num_values, num_bits) // 4
    kept = target.new_empty(num_words, dtype=torch.int32) if keep else None
    offset = start = 0
    for width in widths(num_bits) if keep else [0]:
        rows, num_words = _layout(num_values, width)
        _launch(
            _couple,
            target,
            source,
            value,
            target if kept is None else kept[start:],
            num_words,
            fraction_bits,
            NUM_BITS=num_bits,
            OFFSET=offset,
            WIDTH=width,
            ROWS=rows,
            DIFFERENCE=difference,
            LAST=not keep or offset + width == num_bits,
        )
        offset += width
        start += num_words
    return kept


def uncouple_(
    target: Tensor,
    source: Tensor,
    value: Tensor,
    kept: Tensor | None,
    num_bits: int,
    difference: bool,
    fraction_bits: int,
) -> None:
    """The inverse of `couple_`, in place.

    Without `kept` the bits are those of `source`, or 0 if it is to be added: where a
    stack starts, both streams are equal.
    """
    offset = start = 0
    for width in [0] if kept is None else widths(num_bits):
        rows, num_words = _layout(target.numel(), width)
        _launch(
            _uncouple,
            target,
            source,
            value,
            target if kept is None else kept[start:],
            num_words,
            fraction_bits,
            NUM_BITS=num_bits,
            OFFSET=offset,
            WIDTH=width,
            ROWS=rows,
            DIFFERENCE=difference,
            LAST=kept is None or offset + width == num_bits,
        )
        offset += width
        start += num_words


def _layout(num_values: int, width: int) -> tuple[int, int]:
    """Fields in a word, words; for a width of 0, one element to a "word" unwritten."""
    rows = WORD_BITS // width if width else 1
    return rows, -(-num_values // rows)


def _launch(
    kernel: Any,
    target: Tensor,
    source: Tensor,
    value: Tensor,
    words: Tensor,
    num_words: int,
    fraction_bits: int,
    **constants: int,
) -> None:
    assert target.is_contiguous()
    assert source.is_contiguous()
    assert value.shape == target.shape
    value = value.detach().contiguous()
    if value.dtype == torch.float64:
        value = value.float()
    with torch.cuda.device_of(target):
        kernel[(triton.cdiv(num_words, BLOCK),)](
            target,
            source,
            value,
            words,
            target.numel(),
            num_words,
            2.0**fraction_bits,
            LIMITS[target.dtype] / 2.0**fraction_bits,
            **constants,
            BLOCK=BLOCK,
            # Sums may wrap around, also under TRITON_DEBUG.
            sanitize_overflow=False,
        )
    # What torch does by itself: let autograd see that the tensor was changed.
    torch.autograd.graph.increment_version(target)


# In kernels, capitals are constants of the compilation. `no_type_check` keeps the type
# checker of the tests from wrapping what triton wants to read the source of.


@triton.jit
@no_type_check
def _couple(
    target,
    source,
    value,
    words,
    num_values,
    num_words,
    scale,
    limit,
    NUM_BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits: a stream may have more than 2^31 elements.
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.full((BLOCK,), 0, tl.int32)
    element = column
    for row in tl.static_range(ROWS):
        inside = (column < num_words) & (element < num_values)
        d = tl.load(target + element, mask=inside, other=0)
        if DIFFERENCE:
            d -= tl.load(source + element, mask=inside, other=0)
        field = ((d >> OFFSET) & ((1 << WIDTH) - 1)).to(tl.int32)
        word |= field << (row * WIDTH)
        if LAST:
            quanta = _quanta(value + element, inside, scale, limit, d.dtype)
            tl.store(target + element, (d >> NUM_BITS) + quanta, mask=inside)
        element += num_words
    if WIDTH:
        tl.store(words + column, word, mask=column < num_words)


@triton.jit
@no_type_check
def _uncouple(
    target,
    source,
    value,
    words,
    num_values,
    num_words,
    scale,
    limit,
    NUM_BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if WIDTH:
        word = tl.load(words + column, mask=column < num_words, other=0)
    element = column
    for row in tl.static_range(ROWS):
        inside = (column < num_words) & (element < num_values)
        d = tl.load(target + element, mask=inside, other=0)
        if OFFSET == 0:
            quanta = _quanta(value + element, inside, scale, limit, d.dtype)
            d = (d - quanta) << NUM_BITS
        if WIDTH:
            field = (word >> (row * WIDTH)) & ((1 << WIDTH) - 1)
            d |= field.to(d.dtype) << OFFSET
        if LAST and (DIFFERENCE or (NUM_BITS and not WIDTH)):
            s = tl.load(source + element, mask=inside, other=0)
            if DIFFERENCE:
                d += s
            else:
                d |= s & ((1 << NUM_BITS) - 1)
        tl.store(target + element, d, mask=inside)
        element += num_words


@triton.jit
@no_type_check
def _quanta(pointers, inside, scale, limit, dtype: tl.constexpr):
    """`Fixed.quantise`, without an operation that two machines may round differently.

    A product with a power of two is exact unless it leaves the range of floats: above,
    the clamp comes first; below, what is lost is far under half a quantum. So it does
    not matter if a compiler fuses it with the sum. 2^23 plus a number from 0 to 2^23 is
    rounded to a whole number, half to even; greater ones are whole already.
    """
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(x == x, x, 0.0)
    x = tl.minimum(tl.maximum(x, -limit), limit) * scale
    size = tl.abs(x)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    quanta = size.to(dtype)
    return tl.where(x < 0.0, -quanta, quanta)
