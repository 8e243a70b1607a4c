"""Floating-point streams: the paper's arithmetic.

    couple:  t <- scale t + value          uncouple:  t <- (t - value) / scale

Nothing is kept. The two operations are inverse up to rounding, which every division by
a scale below 1 magnifies (`coupling.growth`). At the paper's scales and in float32, the
gradients five blocks below the top one have errors of about 1% (MEFT1, MEFT2); the
error grows tenfold with every further block and soon reaches 100%. This module serves
as the baseline; `fixed` has no such limit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meft.reversible.coupling import Coupling


@dataclass(frozen=True, kw_only=True, slots=True)
class Floating:
    """Arithmetic of floating-point streams, which are read in `compute_dtype`."""

    compute_dtype: torch.dtype
    stream_dtype: torch.dtype

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Return the dtype of the gradients, which is that of the streams."""
        return self.stream_dtype

    @property
    def limit(self) -> None:
        """Return None: streams can hold infinity and NaN."""

    def enter(self, hidden: Tensor) -> Tensor:
        """Return a copy of `hidden` in `stream_dtype`."""
        return hidden.to(self.stream_dtype, copy=True)

    def read(self, stream: Tensor) -> Tensor:
        """Return the stream, rounded to `compute_dtype`."""
        return stream.to(self.compute_dtype)

    def couple_(
        self, target: Tensor, source: Tensor, value: Tensor, coupling: Coupling
    ) -> None:
        """Scale `target` and add `value`.

        Args:
            target: the stream that changes, `batch seq hidden`.
            source: the other stream, of the same shape.
            value: the output of the branch, of the same shape.
            coupling: the scale and the form of the coupling.
        """
        if coupling.difference:
            target.sub_(source)
        target.mul_(coupling.scale).add_(value)

    def uncouple_(
        self,
        target: Tensor,
        source: Tensor,
        value: Tensor,
        coupling: Coupling,
        kept: Tensor | None,
    ) -> None:
        """Subtract `value` and divide by the scale.

        Args:
            target: the stream that `couple_` changed, `batch seq hidden`.
            source: the other stream, of the same shape.
            value: the output of the branch, of the same shape.
            coupling: the scale and the form of the coupling.
            kept: None, as nothing is kept.
        """
        target.sub_(value).div_(coupling.scale)
        if coupling.difference:
            target.add_(source)
