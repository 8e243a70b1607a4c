"""The step of one method against that of another, taken in turn.

    own rival | rival own | own rival | ...

On a shared machine two processes see two machines. Steps that take turns in one process
see the same one, and the ratio within a turn is what is kept. Who goes first changes
from turn to turn.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from meft_bench.child.meters.clock import StepClock, spread_of_quartiles

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """What the turns after warm-up came to."""

    rival_step_seconds: float
    """Median."""
    step_ratio: float
    """Median of own by rival."""
    step_ratio_iqr: float | None
    """Distance between the quartiles of the same ratios; None below two turns."""


def take_turns(
    own: Step, rival: Step, *, warmup_turns: int, num_turns: int, device: str
) -> Turns:
    """Time `own` and `rival` in turn, `warmup_turns` of the `num_turns` for nothing."""
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
    return Turns(
        rival_step_seconds=statistics.median(rival_seconds),
        step_ratio=statistics.median(ratios),
        step_ratio_iqr=spread_of_quartiles(ratios),
    )
