"""The coupling: an invertible change of one of two streams.

A stack of blocks is a list of couplings. Each coupling changes one stream, its target,
by a function of the other stream, its source:

    t <- scale t + branch(s)              `coupling="paper"`
    t <- scale (t - s) + branch(s)        `coupling="difference"`

The source is unchanged, so the coupling can be undone: compute the branch again,
subtract its value and divide by the scale. One block consists of two couplings, y1 =
scale_1 x1 + F(x2) and y2 = scale_2 x2 + G(y1) (Liao et al., NeurIPS 2023, section 3.1,
with lambda = scale_1 and beta = scale_2). If the source is subtracted first, a small
scale does not mix in an outdated copy of the whole hidden state: only the change made
by one block is scaled. Couplings with a scale of 1 neither need nor allow this.

The arithmetic defines the number format of the streams: `floating`, or `fixed`, whose
inverse is exact.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Function = Callable[..., Tensor]
"""Maps a stream to a tensor of its shape. That of a mixing part is given the `Context`
too, as its second argument.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """A function and the modules whose parameters it uses."""

    function: Function
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """F or G, which computes tokenwise(mixing(s)). Either part may be missing.

    For parallel blocks (`is_sum`) it computes mixing(s) + tokenwise(s) instead.

    The mixing part (attention) reads whole sequences and may read tensors in addition
    to the stream. The tokenwise part is applied to each token independently, so it can
    run in chunks.
    """

    mixing: Part | None = None
    tokenwise: Part | None = None
    is_sum: bool = False
    """Whether both parts read the stream, and are added; then both are given."""
    is_sharded: bool = False
    """Whether FSDP2 gathers the parameters of the branch when it is run, and collects
    their gradients itself.
    """
    is_divided: bool = False
    """Whether it fetches parameters from other processes each time that it is run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coupling:
    """One invertible change of one stream."""

    target: int
    """0 or 1: the stream that changes; its source is the other."""
    branch: Branch
    scale: float
    difference: bool
    block: int
    """Index in the model of the block that the coupling belongs to."""
    number: int
    """Number of the coupling in the model; its random numbers depend on it."""
    starts: bool = False
    """Whether this is the first coupling of the stack, where both streams are equal."""
    holds_block: bool = True
    """Whether the branch contains a piece of the backbone."""


@runtime_checkable
class Arithmetic(Protocol):
    """Number format of streams, with the computation of a coupling and its inverse."""

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Return the dtype of the gradients of streams."""

    @property
    def limit(self) -> tuple[float, int] | None:
        """Return the greatest value that can be added, and the bound on streams.

        No stream may reach the bound. None if streams can hold every value.
        """

    def enter(self, hidden: Tensor) -> Tensor:
        """Return a new stream that holds `hidden`."""

    def read(self, stream: Tensor) -> Tensor:
        """Return the stream in the dtype in which a branch reads it."""

    def couple_(
        self, target: Tensor, source: Tensor, value: Tensor, coupling: Coupling
    ) -> Tensor | None:
        """Apply a coupling to `target` in place.

        Args:
            target: the stream that changes, `batch seq hidden`.
            source: the other stream, of the same shape.
            value: the output of the branch at `source`, of the same shape.
            coupling: the scale and the form of the coupling.

        Returns:
            What has to be kept to undo the coupling; None if that is nothing.
        """

    def uncouple_(
        self,
        target: Tensor,
        source: Tensor,
        value: Tensor,
        coupling: Coupling,
        kept: Tensor | None,
    ) -> None:
        """Undo `couple_` in place.

        Args:
            target: the stream that `couple_` changed, `batch seq hidden`.
            source: the other stream, of the same shape.
            value: the output of the branch at `source`, as in `couple_`.
            coupling: the scale and the form of the coupling.
            kept: what `couple_` returned.
        """


Context = Mapping[str, Tensor]
"""Tensors that branches read in addition to the stream and that require a gradient."""


def growth(scale_1: float, scale_2: float) -> float:
    """Return the factor by which inverting a block in floats magnifies an error.

    With swapped streams, the errors of two successive blocks obey e' = (e + J e'') /
    (scale_1 scale_2), where J is the gain of the block. The factor is therefore the
    positive root of g^2 = (1 + J g) / (scale_1 scale_2). This function uses J = 1. It
    returns 1.6 for scales of 1, 10.9 for (0.1, 1) and 101 for (0.1, 0.1), close to the
    values of real backbones.

    Args:
        scale_1: lambda, the scale of the first coupling.
        scale_2: beta, the scale of the second coupling.
    """
    product = abs(scale_1 * scale_2)
    return (1 + math.sqrt(1 + 4 * product)) / (2 * product)
