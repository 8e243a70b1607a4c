"""Check whether every number fitted into its stream and was finite.

Integer streams have a range. A value beyond it is clamped and a sum beyond it wraps
around: the coupling can still be undone, but the numbers are wrong. The forward
therefore keeps the extremes of every value and of every stream per row of the batch,
four scalars per row and coupling, on the device, and evaluates them at its end:

* All numbers fit if no value exceeds the limit of one addition and no stream reaches
  twice that limit: then nothing was clamped, and no sum or difference has wrapped
  around.
* An infinity or a NaN is an overflow of the backbone itself. The row's output of the
  stack becomes NaN, which a loss scaler expects, and later numbers of the row do not
  count as too large. Rows do not read each other, so the other rows are unaffected.

The host synchronizes with the device once per forward, in `fit`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from meft.reversible.coupling import Arithmetic


class _Seen(NamedTuple):
    """Extremes of one value and its stream, with one element per row of the batch."""

    least: Tensor
    greatest: Tensor
    lowest: Tensor
    highest: Tensor


class Extremes:
    """Record the extremes of all values and streams of one forward.

    Args:
        arithmetic: arithmetic of the streams. Streams of floats hold every value, so
            nothing is recorded for them.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        self._limit = arithmetic.limit
        self._blocks: list[int] = []
        self._seen: list[_Seen] = []

    def note(self, block: int, value: Tensor, stream: Tensor) -> None:
        """Record that a value of `block` was added to `stream`.

        Args:
            block: index of the block in the model.
            value: the output of the branch, or the input of the stack; rows come first.
            stream: the stream after the addition, of the same shape.
        """
        if self._limit is None:
            return
        self._blocks.append(block)
        # In a row with a NaN, every extreme is NaN.
        self._seen.append(_Seen(*_of_rows(value.detach()), *_of_rows(stream)))

    def finite(self) -> Tensor | None:
        """Return for each row whether all its values were finite.

        The result is a tensor on the device, or None for streams of floats.
        """
        return self._finite().all(0) if self._seen else None

    def fit(self) -> bool:
        """Return whether every number fitted; synchronizes with the device."""
        return not self._seen or bool((~self._too_large()).all())

    def first_too_large(self) -> tuple[int, float | None]:
        """Return the lowest block with a number that did not fit.

        Returns:
            Its index and the greatest value that it computed; None instead of the value
            if all its values fitted and the sum in the stream did not.
        """
        assert self._limit is not None
        rows = self._too_large()
        index = int(rows.any(1).int().argmax())
        seen, row = self._seen[index], rows[index]
        values = torch.stack([-seen.least[row], seen.greatest[row]])
        greatest = float(values.max())
        return self._blocks[index], greatest if greatest > self._limit[0] else None

    def _finite(self) -> Tensor:
        least, greatest, *_ = self._stacked()
        return least.isfinite() & greatest.isfinite()

    def _too_large(self) -> Tensor:
        """Return, per value and row, whether the value or its stream did not fit.

        Only numbers count that follow no infinity or NaN in their row.
        """
        assert self._limit is not None
        least, greatest, lowest, highest = self._stacked()
        value, stream = self._limit
        beyond = (least < -value) | (greatest > value)
        beyond |= (lowest <= -stream) | (highest >= stream)
        return beyond & self._finite().cumprod(0).bool()

    def _stacked(self) -> list[Tensor]:
        return [torch.stack(list(column)) for column in zip(*self._seen, strict=True)]


def _of_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest element of every row."""
    rows = tensor.flatten(1)
    if rows.is_cuda:
        return torch.aminmax(rows, dim=1)
    # On a CPU, torch's `aminmax(dim=...)` takes four times as long as both calls below.
    return rows.amin(1), rows.amax(1)
