"""Fixed-point streams, whose inverse is exact.

A stream is a tensor of integers, in quanta of q = 2^-fraction_bits. Scales are powers
of two, 2^-k, so scaling is a shift. The k bits that the shift drops are kept:

    couple:    d = t [- s];  r = d & (2^k - 1);  t <- (d >> k) + Q(value);   keep r
    uncouple:  d = ((t - Q(value)) << k) | r;    t <- d [+ s]

Integers are restored bit by bit, whatever the depth, the scale or the precision of the
branches; an addition that wraps around is undone exactly too. The one condition is that
a branch gives the same value again. Rounding has the gradient of the identity, as the
rounding of floats has under autograd.

Integers have 32 bits as long as all numbers fit, and 64 if they do not (`extremes`
checks this, `blocks` decides). Quanta are the same, so both widths compute the same
function, bit for bit, and the width does not have to be saved or synchronized between
processes.

This module contains the reference implementation, which also runs on a CPU. On a GPU,
where the couplings are limited by memory traffic, `triton_kernels` computes the same
bits in one pass.

Related work: Maclaurin et al., ICML 2015 (an information buffer makes momentum
reversible); MacKay et al., NeurIPS 2018 (the bits that forgetting must keep); Zhang et
al., arXiv 2407.09093 (one side bit for a scale of 1/2, trained from scratch).
"""

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meft.replaceable import Replaceable
from meft.reversible.coupling import Coupling
from meft.reversible.integer_format import LIMITS
from meft.reversible.packing import pack, put_back_


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """Arithmetic of int32 or int64 streams, which are read in `compute_dtype`."""

    compute_dtype: torch.dtype
    fraction_bits: int
    gradient_dtype: torch.dtype = torch.float32
    stream_dtype: torch.dtype = torch.int32

    def enter(self, hidden: Tensor) -> Tensor:
        """Return `hidden` in quanta."""
        return self.quantise(hidden.contiguous())

    def read(self, stream: Tensor) -> Tensor:
        """Return the stream as floats, rounded to `compute_dtype`."""
        # The factor is a power of two: the product is exact, only the two casts round.
        return stream.float().mul_(2.0**-self.fraction_bits).to(self.compute_dtype)

    def quantise(self, value: Tensor) -> Tensor:
        """Return Q(value), rounded to the nearest quantum, half to even.

        Values beyond the limit are clamped and NaN becomes 0, so that a coupling can
        always be undone; `extremes` detects such values.
        """
        limit = LIMITS[self.stream_dtype]
        quanta = value.to(torch.float32, copy=True).mul_(2.0**self.fraction_bits)
        quanta.nan_to_num_(nan=0.0, posinf=limit, neginf=-limit).clamp_(-limit, limit)
        return quanta.round_().to(self.stream_dtype)

    @property
    def limit(self) -> tuple[float, int]:
        """Return the greatest value that is not clamped, and the bound on streams.

        The bound is in quanta. With both streams below twice the limit of an addition,
        an overflow of their difference or of its sum with a value is always detected.
        """
        limit = LIMITS[self.stream_dtype]
        return limit * 2.0**-self.fraction_bits, 2 * int(limit)

    def couple_(
        self, target: Tensor, source: Tensor, value: Tensor, coupling: Coupling
    ) -> Tensor | None:
        """Shift the target, add the value, and return the bits shifted out.

        Args:
            target: the stream that changes, `batch seq hidden`.
            source: the other stream, of the same shape.
            value: the output of the branch, of the same shape.
            coupling: the scale and the form of the coupling.

        Returns:
            The bits shifted out; None if there are none to keep.
        """
        num_bits = lost_bits(coupling)
        keep = num_bits > 0 and not coupling.starts
        if found := kernels(target, source):
            out: Tensor | None = found.couple_(
                target,
                source,
                value,
                num_bits,
                coupling.difference,
                self.fraction_bits,
                keep,
            )
            return out
        if coupling.difference:
            target.sub_(source)
        kept = pack(target, num_bits) if keep else None
        if num_bits:
            target.bitwise_right_shift_(num_bits)
        target.add_(self.quantise(value))
        return kept

    def uncouple_(
        self,
        target: Tensor,
        source: Tensor,
        value: Tensor,
        coupling: Coupling,
        kept: Tensor | None,
    ) -> None:
        """Subtract the value, shift back and restore the bits.

        Args:
            target: the stream that `couple_` changed, `batch seq hidden`.
            source: the other stream, of the same shape.
            value: the output of the branch, of the same shape.
            coupling: the scale and the form of the coupling.
            kept: what `couple_` returned.
        """
        num_bits = lost_bits(coupling)
        if found := kernels(target, source):
            found.uncouple_(
                target,
                source,
                value,
                kept,
                num_bits,
                coupling.difference,
                self.fraction_bits,
            )
            return
        target.sub_(self.quantise(value))
        if num_bits:
            target.bitwise_left_shift_(num_bits)
        if kept is not None:
            put_back_(target, kept, num_bits)
        elif num_bits and not coupling.difference:
            # At the bottom of the stack both streams were equal: the source has the
            # bits.
            target.bitwise_or_(source & (2**num_bits - 1))
        if coupling.difference:
            target.add_(source)


def lost_bits(coupling: Coupling) -> int:
    """Return k of a scale of 2^-k."""
    return round(-math.log2(coupling.scale))


def kernels(target: Tensor, source: Tensor) -> Any:
    """Return `meft.reversible.triton_kernels` if it supports these streams, or None.

    It supports contiguous streams on CUDA if triton works on that device.
    """
    if target.is_cuda and target.is_contiguous() and source.is_contiguous():
        return kernels_on(target.device)
    return None


@Replaceable
def kernels_on(device: torch.device) -> Any:
    """Return the module whose kernels couple streams on `device`; None without one."""
    return load_kernels(device)


@functools.cache
def load_kernels(device: torch.device) -> Any:
    """Return `meft.reversible.triton_kernels` if it works on `device`, or None.

    Warns:
        RuntimeWarning: triton is installed and does not work on `device`.
    """
    try:
        from meft.reversible import triton_kernels
    except ImportError:
        return None
    try:
        target, source = torch.zeros(2, 1, dtype=torch.int32, device=device)
        triton_kernels.couple_(target, source, target.float(), 0, False, 0, False)
    except Exception as error:
        # Triton needs a C compiler where it runs and does not support every device. The
        # exceptions that it raises then have no common class.
        warnings.warn(
            f"streams on {device} are computed without triton, which is slower and "
            f"gives the same bits: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=6,
        )
        return None
    return triton_kernels
