"""How exact was the inverse? Samples of the true streams, compared when rebuilt.

A branch's gradients are taken at its source: F sees the rebuilt x2, G the rebuilt y1.
So a block trains well if these two are right, and on noise if they are not, whatever
its own x1 looks like. The probe keeps some elements of every stream before a coupling
changes it and reports relative errors in the backward. The library probes the first
step of `floating` stacks only; `meft.testing` probes every element.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meft.reversible.coupling import Coupling, growth

LOST = 0.1
"""Relative error of a block's point above which its gradients count as lost."""


class Probe:
    """True and rebuilt streams of one forward and backward.

    Args:
        num_samples: elements kept per coupling, evenly spaced; 0 keeps all.
        when_done: called with the probe when the backward has seen every coupling.
    """

    def __init__(
        self,
        num_samples: int = 4096,
        when_done: "Callable[[Probe], None] | None" = None,
    ) -> None:
        self._num_samples = num_samples
        self._when_done = when_done
        self._couplings: Sequence[Coupling] = ()
        self._expected: dict[int, Tensor] = {}
        self.errors: dict[int, float] = {}
        """Relative error of the rebuilt target of each coupling, by the coupling's
        index."""

    def expect(self, couplings: Sequence[Coupling], index: int, target: Tensor) -> None:
        """Remember the true target of coupling `index` of `couplings`."""
        self._couplings = couplings
        self._expected[index] = self._sample(target)

    def compare(self, index: int, target: Tensor) -> None:
        """Hold the rebuilt target of coupling `index` against the true one."""
        self.errors[index] = relative_error(self._sample(target), self._expected[index])

    def finish(self) -> None:
        """The backward has seen every coupling."""
        if self._when_done is not None:
            self._when_done(self)

    def blocks(self) -> list[int]:
        """Index in the model of each block that was seen, lowest first."""
        return list(dict.fromkeys(coupling.block for coupling in self._couplings))

    def rebuilt_errors(self) -> list[float]:
        """Error of the rebuilt input of each block: the larger of its streams'."""
        return _worst(
            self._couplings, [self.errors[i] for i in range(len(self._couplings))]
        )

    def point_errors(self) -> list[float]:
        """Error of the point that each block is differentiated at."""
        couplings = self._couplings
        latest, at_source = [0.0, 0.0], [0.0] * len(couplings)
        for index in reversed(range(len(couplings))):
            target = couplings[index].target
            at_source[index] = latest[1 - target]
            latest[target] = self.errors[index]
        return _worst(couplings, at_source)

    def _sample(self, x: Tensor) -> Tensor:
        flat = x.detach().flatten()
        if not self._num_samples:
            return flat.clone()
        stride = max(1, flat.numel() // self._num_samples)
        return flat[::stride][: self._num_samples].clone()


def _worst(couplings: Sequence[Coupling], errors: Sequence[float]) -> list[float]:
    worst: dict[int, float] = {}
    for coupling, error in zip(couplings, errors, strict=True):
        worst[coupling.block] = max(worst.get(coupling.block, 0.0), error)
    return list(worst.values())


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, and infinity where `got` is not finite."""
    difference = (got.double() - expected.double()).norm()
    if difference == 0:  # also where both are 0
        return 0.0
    error = difference / expected.double().norm()
    return float(error) if torch.isfinite(error) else float("inf")


def warning_text(
    blocks: Sequence[int],
    errors: Sequence[float],
    scale_1: float,
    scale_2: float,
    dtype: torch.dtype,
) -> str | None:
    """Which blocks have lost their gradient and what to do; None if none has."""
    lost = [b for b, error in zip(blocks, errors, strict=True) if not error <= LOST]
    if not lost:
        return None
    end = blocks[-1] + 1
    fewer = f"rebuild fewer blocks (`span=({lost[-1] + 1}, {end})`), "
    return (
        f"the floating-point inverse has lost the gradient of blocks {_ranges(lost)}: "
        f"their rebuilt activations are off by up to {max(errors):.0e} "
        f"(relative), so their adapters would train on noise. Scales ({scale_1:g}, "
        f"{scale_2:g}) magnify rounding about {growth(scale_1, scale_2):.0f}-fold per "
        f"block, and streams are {str(dtype).removeprefix('torch.')}. Take "
        "`arithmetic='fixed'`, whose inverse is exact; or "
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
