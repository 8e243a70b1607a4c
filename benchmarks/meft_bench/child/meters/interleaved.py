"""The step time of one method relative to another, with interleaved steps.

    own reference | reference own | own reference | ...

On a shared machine, two processes may run under different load. Steps that alternate in
one process run under the same load, and the ratio within a pair is recorded. The order
changes from pair to pair.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from meft_bench.child.meters.clock import StepClock, spread_of_quartiles

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class InterleavedTimes:
    """Statistics over the pairs after warm-up."""

    reference_step_seconds: float
    """Median over the steps of the reference method."""
    step_ratio: float
    """Median of the ratios of own step to reference step."""
    step_ratio_iqr: float | None
    """Interquartile range of the same ratios; None below two pairs."""


def time_interleaved(
    own: Step, reference: Step, *, warmup_pairs: int, num_pairs: int, device: str
) -> InterleavedTimes:
    """Time `own` and `reference` alternately.

    Args:
        own: takes one step of the method.
        reference: takes one step of the reference method.
        warmup_pairs: number of first pairs that are not counted.
        num_pairs: number of pairs of steps, warm-up included.
        device: on `cuda`, the clocks synchronise the device.

    Returns:
        Median step seconds and ratios.
    """
    clocks = {
        step: StepClock(warmup_steps=warmup_pairs, device=device)
        for step in (own, reference)
    }
    for index in range(num_pairs):
        pair = (own, reference) if index % 2 == 0 else (reference, own)
        for step in pair:
            with clocks[step].step():
                step()
    seconds, reference_seconds = (
        clocks[step].all_step_seconds[warmup_pairs:] for step in (own, reference)
    )
    ratios = [a / b for a, b in zip(seconds, reference_seconds, strict=True)]
    return InterleavedTimes(
        reference_step_seconds=statistics.median(reference_seconds),
        step_ratio=statistics.median(ratios),
        step_ratio_iqr=spread_of_quartiles(ratios),
    )
