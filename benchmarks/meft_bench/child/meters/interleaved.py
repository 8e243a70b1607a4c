"""The step time of one method relative to another, with interleaved steps.

    own rival | rival own | own rival | ...

On a shared machine, two processes may run under different load. Steps that alternate in
one process run under the same load, and the ratio within a turn is recorded. The order
changes from turn to turn.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from meft_bench.child.meters.clock import StepClock, spread_of_quartiles

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class InterleavedTimes:
    """Statistics over the turns after warm-up."""

    rival_step_seconds: float
    """Median over the steps of the reference method."""
    step_ratio: float
    """Median of the ratios of own step to reference step."""
    step_ratio_iqr: float | None
    """Interquartile range of the same ratios; None below two turns."""


def time_interleaved(
    own: Step, rival: Step, *, warmup_turns: int, num_turns: int, device: str
) -> InterleavedTimes:
    """Time `own` and `rival` alternately.

    Args:
        own: takes one step of the method.
        rival: takes one step of the reference method.
        warmup_turns: number of first turns that are not counted.
        num_turns: number of turns, warm-up included.
        device: on `cuda`, the clocks synchronise the device.

    Returns:
        Median step seconds and ratios.
    """
    clocks = {
        step: StepClock(warmup_steps=warmup_turns, device=device)
        for step in (own, rival)
    }
    for turn in range(num_turns):
        pair = (own, rival) if turn % 2 == 0 else (rival, own)
        for step in pair:
            with clocks[step].step():
                step()
    seconds, rival_seconds = (
        clocks[step].all_step_seconds[warmup_turns:] for step in (own, rival)
    )
    ratios = [a / b for a, b in zip(seconds, rival_seconds, strict=True)]
    return InterleavedTimes(
        rival_step_seconds=statistics.median(rival_seconds),
        step_ratio=statistics.median(ratios),
        step_ratio_iqr=spread_of_quartiles(ratios),
    )
