"""The couplings of `fixed` on a GPU, which read and write every number once.

    couple:    d = t [- s];  keep d & (2^k - 1);  t <- (d >> k) + Q(value)
    uncouple:  t <- (((t - Q(value)) << k) | kept) [+ s]

The kernels compute bit for bit what `Fixed` computes with a dozen torch operations,
which are the reference. The kept bits have the layout of `packing`, so either
implementation can undo the other. One program takes a block of words, and with them the
elements i W + j of all their fields, so it shares neither a word nor a number with
another program.

One launch is enough where k is a power of two or 0, or where nothing is kept. Otherwise
the words of each width have a layout of their own and each width takes a launch: when
coupling, all launches but the last only read the target; when uncoupling, each launch
adds its bits. Bytes moved per element, where v is the size of one number of `value` and
the terms in brackets apply if the coupling has a difference:

    one launch      either way    8 + v + k/8 [+ 4]
    two launches    couple       12 + v + k/8 [+ 8]
                    uncouple     16 + v + k/8 [+ 4]

For k = 4 and 16-bit values that is 10.5 [14.5]; the separate torch operations move
about 110 [120]. For streams of 64 bits, the terms 8, 12, 16 and those in brackets
double.

This module needs triton, so only `fixed.load_kernels` imports it.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from meft.reversible.integer_format import LIMITS
from meft.reversible.packing import WORD_BITS, packed_bytes, widths

BLOCK = 512
"""Words per program: four for every thread of the four warps that triton uses."""


def couple_(
    target: Tensor,
    source: Tensor,
    value: Tensor,
    num_bits: int,
    difference: bool,
    fraction_bits: int,
    keep: bool,
) -> Tensor | None:
    """Apply a coupling to `target` in place.

    Args:
        target: the stream that changes, contiguous, int32 or int64.
        source: the other stream, of the same shape and dtype.
        value: the output of the branch, of the same shape.
        num_bits: k of the scale 2^-k.
        difference: whether `source` is subtracted first.
        fraction_bits: the quantum is 2^-fraction_bits.
        keep: whether to return the bits that are shifted out.

    Returns:
        The bits shifted out as int32 words, one-dimensional; None if not `keep`.
    """
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
    """Undo `couple_` in place.

    Without `kept`, the restored bits are those of `source`, or 0 if `source` is to be
    added: at the bottom of a stack both streams are equal.

    Args:
        target: the stream that `couple_` changed, contiguous, int32 or int64.
        source: the other stream, of the same shape and dtype.
        value: the output of the branch, of the same shape.
        kept: what `couple_` returned.
        num_bits: k of the scale 2^-k.
        difference: whether `source` is added at the end.
        fraction_bits: the quantum is 2^-fraction_bits.
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
    """Return the fields per word and the number of words.

    For a width of 0, each element counts as one word, which is not written.
    """
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
    # Tell autograd about the in-place change, as torch operations do.
    torch.autograd.graph.increment_version(target)


# In kernels, names in capitals are compile-time constants. `no_type_check` keeps the
# type checker of the tests from wrapping functions whose source triton has to read.


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
    # Offsets have 64 bits: a stream may have more than 2^31 elements.
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
    """Compute `Fixed.quantise` with operations that every machine rounds alike.

    A product with a power of two is exact unless it leaves the range of floats: for
    large values the clamp comes first; for small values the loss is far below half a
    quantum. Fusing the product with the sum therefore does not change the result. 2^23
    plus a number from 0 to 2^23 is rounded to a whole number, half to even; greater
    numbers are whole already.
    """
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(x == x, x, 0.0)
    x = tl.minimum(tl.maximum(x, -limit), limit) * scale
    size = tl.abs(x)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    quanta = size.to(dtype)
    return tl.where(x < 0.0, -quanta, quanta)
