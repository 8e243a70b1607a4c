"""Measurement of the inverse: samples of true streams, compared with rebuilt ones.

A branch's gradients are computed at its source: F reads the rebuilt x2, G the rebuilt
y1. A block therefore trains well if these two are right, whatever its own x1 is. The
relative error of its gradients is between a tenth and three times that of these
streams, until it reaches 100%. Tokens are weighted by the gradient that they receive,
so the values of padding do not matter.

The probe keeps some elements of every stream before a coupling changes it and reports
relative errors in the backward. The library probes the first step of `floating` stacks
only; `meft.testing` probes every element.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meft.reversible.coupling import Coupling, growth

LOST = 0.1
"""Relative error of a block's gradients above which a report calls them lost."""
WARN_ABOVE = 0.01
"""Estimated relative error of a block's gradients above which training warns."""


class InverseErrorProbe:
    """Compare true and rebuilt streams of one forward and backward.

    Args:
        num_samples: elements kept per coupling, evenly spaced; 0 keeps all.
        when_done: function called with the probe at the end of the backward.
    """

    def __init__(
        self,
        num_samples: int = 4096,
        when_done: "Callable[[InverseErrorProbe], None] | None" = None,
    ) -> None:
        self._num_samples = num_samples
        self._when_done = when_done
        self._couplings: Sequence[Coupling] = ()
        self._expected: dict[int, Tensor] = {}
        self.errors: dict[int, float] = {}
        """Relative error of each coupling's rebuilt target, by the coupling's index."""
        self._rebuilt: dict[int, tuple[Tensor, Tensor]] = {}
        """Samples of each stream as last rebuilt: its error and its true value."""
        self._estimates: dict[int, float] = {}

    def expect(self, couplings: Sequence[Coupling], index: int, target: Tensor) -> None:
        """Store samples of the true target of coupling `index`.

        Args:
            couplings: all couplings of the stack, lowest first.
            index: the position of the coupling in `couplings`.
            target: the stream before the coupling, `batch seq hidden`.
        """
        self._couplings = couplings
        self._expected[index] = self._sample(target)

    def compare(self, index: int, target: Tensor) -> None:
        """Compare the rebuilt target of coupling `index` with the true one."""
        got, expected = self._sample(target), self._expected[index]
        self.errors[index] = relative_error(got, expected)
        error = got.double() - expected.double()
        self._rebuilt[self._couplings[index].target] = error, expected.double()

    def weigh(self, index: int, gradient: Tensor | None) -> None:
        """Estimate the relative error of the gradients of coupling `index`.

        It is computed from the gradient of the coupling's target, before the coupling
        is differentiated.
        """
        source = 1 - self._couplings[index].target
        if gradient is None or source not in self._rebuilt:
            self._estimates[index] = 0.0
            return
        error, expected = self._rebuilt[source]
        weight = self._sample(gradient.norm(dim=-1, keepdim=True).expand_as(gradient))
        weight = weight.double()
        self._estimates[index] = relative_error(
            weight * (expected + error), weight * expected
        )

    def finish(self) -> None:
        """Report the end of the backward to `when_done`."""
        if self._when_done is not None:
            self._when_done(self)

    def blocks(self) -> list[int]:
        """Return the index in the model of each probed block, lowest first."""
        return list(dict.fromkeys(coupling.block for coupling in self._couplings))

    def rebuilt_errors(self) -> list[float]:
        """Return the error of each block's rebuilt input: its streams' larger one."""
        return _worst(
            self._couplings, [self.errors[i] for i in range(len(self._couplings))]
        )

    def estimated_errors(self) -> list[float]:
        """Return the estimated relative error of the gradients of each block."""
        return _worst(
            self._couplings, [self._estimates[i] for i in range(len(self._couplings))]
        )

    def point_errors(self) -> list[float]:
        """Return the error of the point at which each block is differentiated."""
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
    """Return |got - expected| / |expected|, or infinity where `got` is not finite."""
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
    """Describe by how much the gradients of which blocks are wrong, and the remedies.

    Args:
        blocks: index in the model of each rebuilt block, lowest first.
        errors: estimated relative error of the gradients of each block.
        scale_1: scale of the first coupling of a block.
        scale_2: scale of the second coupling of a block.
        dtype: dtype of the streams.

    Returns:
        The text; None if no error is above `WARN_ABOVE`.
    """
    by_block = dict(zip(blocks, errors, strict=True))
    wrong = [block for block, error in by_block.items() if not error <= WARN_ABOVE]
    if not wrong:
        return None
    noise = [block for block in wrong if not by_block[block] < 1]
    parts = [f"those of block {b} by about {by_block[b]:.0%}" for b in wrong[::-1]]
    parts = parts[: len(wrong) - len(noise)]
    if noise:
        block = f"block{'s' if len(noise) > 1 else ''} {_ranges(noise)}"
        parts.append(f"those of {block} by 100% or more, which is noise")
    end = blocks[-1] + 1
    fewer = f"rebuild fewer blocks (`span=({wrong[-1] + 1}, {end})`), "
    return (
        "the floating-point inverse makes gradients wrong, by an estimate from the "
        f"activations that were rebuilt: {', '.join(parts)}. Scales ({scale_1:g}, "
        f"{scale_2:g}) magnify rounding about {growth(scale_1, scale_2):.0f}-fold per "
        f"block, and streams are {str(dtype).removeprefix('torch.')}. Take "
        "`arithmetic='fixed'`, whose inverse is exact; or "
        f"{fewer if wrong[-1] + 1 < end else ''}move the scales towards 1, or use "
        "`backward='store'`. `meft.testing.check_reversible()` measures the error of "
        "every block"
    )


def _ranges(blocks: list[int]) -> str:
    """Return sorted block numbers as text: [0, 1, 2, 5] becomes '0-2, 5'."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
