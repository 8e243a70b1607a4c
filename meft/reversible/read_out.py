"""The output of a reversible stack, from its two streams.

That of `fixed` streams is the fresh stream; the other one is one block behind. That of
`float` streams follows the authors: after post-norm blocks it is the mean of both
streams, otherwise the fresh stream plus a tenth of the other.
"""

import torch
from torch import Tensor

from meft.reversible.twin import Stack, Streams, read
from meft.shapes import Hidden

STALE_WEIGHT = 0.1
"""Factor on the other stream in the read-out of pre-norm `float` stacks."""


def read_out(
    stack: Stack, streams: Streams, fresh: int, finite: Tensor | None
) -> Hidden:
    """Return the fresh stream.

    Args:
        stack: the couplings.
        streams: both streams after the top block.
        fresh: the index of the stream that has just passed through the top block.
        finite: for each row of the batch, whether all of its values were finite; None
            for `float` streams, which hold infinity and NaN themselves.

    Returns:
        The output, `batch seq hidden`.
    """
    out = read(stack, streams.pair()[fresh])
    if finite is not None:
        # Streams clamp values, so NaN is added here: a loss scaler detects the
        # overflow.
        zero = out.new_zeros(())
        added = torch.where(finite, zero, zero + torch.nan)
        out.add_(added.view(-1, *[1] * (out.dim() - 1)))
    return out


def read_out_of_both(
    stack: Stack, streams: Streams, fresh: int, is_post_norm: bool
) -> Hidden:
    """Return the read-out of `float` streams.

    Args:
        stack: the couplings.
        streams: both streams after the top block.
        fresh: the index of the stream that has just passed through the top block.
        is_post_norm: whether the top block ends in a norm.

    Returns:
        The output, `batch seq hidden`.
    """
    out = read_out(stack, streams, fresh, finite=None)
    stale = read(stack, streams.pair()[1 - fresh])
    if is_post_norm:
        return (out + stale) / 2
    return out + STALE_WEIGHT * stale
