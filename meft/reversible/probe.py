"""How exact was the inverse? Samples of the true streams, compared when rebuilt.

A block's gradients are taken at the point (x2, y1): F sees the rebuilt x2, G the
rebuilt y1, which is an input stream of the block above. So a block trains well if these
two are right, and on noise if they are not, whatever its own x1 looks like. The probe
keeps some elements of every block's input pair in the forward and reports relative
errors in the backward. The library probes the first step only; `meft.testing` probes
every element.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from meft.reversible.coupling import growth

LOST = 0.1
"""Relative error of a block's point above which its gradients count as lost."""


class Probe:
    """True and rebuilt input pairs of one forward and backward.

    Args:
        num_blocks: blocks in the stack.
        num_samples: elements kept per stream, evenly spaced; 0 keeps all.
        when_done: called with the probe when the backward has seen every block.
    """

    def __init__(
        self,
        num_blocks: int,
        num_samples: int = 4096,
        when_done: "Callable[[Probe], None] | None" = None,
    ) -> None:
        self._num_samples = num_samples
        self._when_done = when_done
        self._expected: list[tuple[Tensor, Tensor] | None] = [None] * num_blocks
        self.errors: list[tuple[float, float]] = [(0.0, 0.0)] * num_blocks
        """Relative error of the rebuilt (x1, x2) of each block, lowest first."""

    def expect(self, index: int, x1: Tensor, x2: Tensor) -> None:
        """Remember the true input pair of block `index`."""
        self._expected[index] = (self._sample(x1), self._sample(x2))

    def compare(self, index: int, x1: Tensor, x2: Tensor) -> None:
        """Hold a rebuilt input pair of block `index` against the true one."""
        expected = self._expected[index]
        assert expected is not None, "the forward shows every block to the probe"
        got = (self._sample(x1), self._sample(x2))
        self.errors[index] = (
            relative_error(got[0], expected[0]),
            relative_error(got[1], expected[1]),
        )

    def finish(self) -> None:
        """The backward has seen every block."""
        if self._when_done is not None:
            self._when_done(self)

    def point_errors(self, swap: bool) -> list[float]:
        """Relative error of the point each block is differentiated at."""
        y1_slot = 1 if swap else 0
        above = [*(pair[y1_slot] for pair in self.errors[1:]), 0.0]
        return [max(pair[1], y1) for pair, y1 in zip(self.errors, above, strict=True)]

    def _sample(self, x: Tensor) -> Tensor:
        flat = x.detach().flatten()
        if not self._num_samples:
            return flat.clone()
        stride = max(1, flat.numel() // self._num_samples)
        return flat[::stride][: self._num_samples].clone()


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, and infinity where `got` is not finite."""
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    return float(error) if torch.isfinite(error) else float("inf")


def warning_text(
    errors: list[float],
    first_block: int,
    scale_1: float,
    scale_2: float,
    dtype: torch.dtype,
) -> str | None:
    """Which blocks have lost their gradient and what to do; None if none has."""
    lost = [first_block + i for i, error in enumerate(errors) if not error <= LOST]
    if not lost:
        return None
    end = first_block + len(errors)
    fewer = f"rebuild fewer blocks (`span=({lost[-1] + 1}, {end})`), "
    return (
        f"the floating-point inverse has lost the gradient of blocks {_ranges(lost)}: "
        f"their rebuilt activations are off by up to {max(errors):.0e} (relative), so "
        f"their adapters would train on noise. Scales ({scale_1:g}, {scale_2:g}) "
        f"magnify rounding about {growth(scale_1, scale_2):.0f}-fold per block, and "
        f"streams are {str(dtype).removeprefix('torch.')}. Either "
        f"{fewer if lost[-1] + 1 < end else ''}move the scales towards 1, or use "
        "`backward='store'`. `meft.testing.check_reversible()` shows every block"
    )


def _ranges(blocks: list[int]) -> str:
    """Sorted block numbers as text: [0, 1, 2, 5] becomes '0-2, 5'."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
