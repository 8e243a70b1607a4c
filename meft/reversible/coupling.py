"""The coupling: an invertible change of one of two streams.

A stack of blocks is a list of couplings. Each changes one stream, its target, by a
function of the other, its source:

    t <- scale t + branch(s)              `coupling="paper"`
    t <- scale (t - s) + branch(s)        `coupling="difference"`

The source is still there afterwards, so the coupling can be undone: subtract what the
branch gives again, divide by the scale. One block is two couplings, y1 = scale_1 x1 +
F(x2) and y2 = scale_2 x2 + G(y1) (Liao et al., NeurIPS 2023, section 3.1, with lambda =
scale_1 and beta = scale_2). Subtracting the source first keeps a small scale from
mixing in a stale copy of the whole hidden state: what is scaled is only the change that
one block made. Couplings with a scale of 1 have no need of it and no room for it.

How streams hold their numbers is the arithmetic's business: `floating`, or `fixed`,
whose inverse is exact.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Function = Callable[..., Tensor]
"""A stream in, and by name what else the branch reads; a tensor of its shape out."""


@dataclass(frozen=True, slots=True)
class Part:
    """A function and the modules whose parameters it uses."""

    function: Function
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """F or G: tokenwise(mixing(s)). Either may be missing.

    The mixing part (attention) sees a whole sequence, and may read tensors beside the
    stream; the tokenwise part sees one token at a time, so it can be run in chunks.
    """

    mixing: Part | None = None
    tokenwise: Part | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Coupling:
    """One change of one stream."""

    target: int
    """0 or 1: the stream that changes; its source is the other."""
    branch: Branch
    scale: float
    difference: bool
    block: int
    """Index in the model of the block that the coupling belongs to."""
    number: int
    """Of the coupling in the model: what its random numbers depend on."""
    starts: bool = False
    """Whether this is the first coupling of all, where both streams are still equal."""


@runtime_checkable
class Arithmetic(Protocol):
    """How streams hold their numbers, and how a coupling and its inverse compute."""

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of the gradients of streams."""

    @property
    def limit(self) -> tuple[float, int] | None:
        """The greatest value that one addition takes, and what no stream may reach.

        None if streams hold every number that a value can be.
        """

    def enter(self, hidden: Tensor) -> Tensor:
        """A new stream that holds `hidden`."""

    def read(self, stream: Tensor) -> Tensor:
        """The stream as a branch reads it."""

    def couple_(
        self, target: Tensor, source: Tensor, value: Tensor, coupling: Coupling
    ) -> Tensor | None:
        """`coupling` on `target` in place; returns what has to be kept to undo it."""

    def uncouple_(
        self,
        target: Tensor,
        source: Tensor,
        value: Tensor,
        coupling: Coupling,
        kept: Tensor | None,
    ) -> None:
        """The inverse of `couple_`, in place."""


Context = Mapping[str, Tensor]
"""Tensors beside the stream that branches read and that want a gradient, by name."""


def growth(scale_1: float, scale_2: float) -> float:
    """Factor by which undoing one block magnifies an error already there, in floats.

    With swapped streams the errors of two successive blocks obey
    e' = (e + J e'') / (scale_1 scale_2), J the gain of the block, so the factor is the
    positive root of g^2 = (1 + J g) / (scale_1 scale_2). J = 1 here: 1.6 for scales of
    1, 10.9 for (0.1, 1), 101 for (0.1, 0.1), close to what real backbones show.
    """
    product = abs(scale_1 * scale_2)
    return (1 + math.sqrt(1 + 4 * product)) / (2 * product)
