"""Floating-point streams: the paper's arithmetic.

    couple:  t <- scale t + value          uncouple:  t <- (t - value) / scale

Nothing is kept. The two are inverse up to rounding, which every division by a scale
below 1 magnifies (`coupling.growth`): at the paper's scales and in float32, gradients
are wrong by about 1% five blocks below the top one (MEFT1, MEFT2), by ten times as much
with every block below, and soon by all of their size. Here as the baseline; `fixed` has
no such limit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meft.reversible.coupling import Coupling


@dataclass(frozen=True, kw_only=True, slots=True)
class Floating:
    """Streams of `stream_dtype`, read in `compute_dtype`."""

    compute_dtype: torch.dtype
    stream_dtype: torch.dtype

    @property
    def gradient_dtype(self) -> torch.dtype:
        """That of the streams."""
        return self.stream_dtype

    @property
    def limit(self) -> None:
        """Streams hold infinity and not-a-number as they come."""

    def enter(self, hidden: Tensor) -> Tensor:
        """A copy of `hidden`."""
        return hidden.to(self.stream_dtype, copy=True)

    def read(self, stream: Tensor) -> Tensor:
        """The stream, rounded to what branches compute in."""
        return stream.to(self.compute_dtype)

    def couple_(
        self, target: Tensor, source: Tensor, value: Tensor, coupling: Coupling
    ) -> None:
        """Scale, add."""
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
        """Subtract, divide."""
        target.sub_(value).div_(coupling.scale)
        if coupling.difference:
            target.add_(source)
