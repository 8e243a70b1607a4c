"""Progress of `plan` and `fit`: a line for each plan that was made.

The child prints them on its standard error output, beginning with `MARK`; its parent
shows these lines and no others.
"""

import contextlib
import math
import sys

from meft_bench.shared.request import MARK
from meft_bench.shared.units import format_bytes
from meft_bench.virtual.prediction.plan import MemoryPlan


def tell(
    method: str, field: str, value: int, needed_bytes: float | None, room_bytes: float
) -> None:
    """Print what a value of a field needs, and whether that fits.

    Args:
        method: name of the method.
        field: the field that is maximized.
        value: the value that was planned.
        needed_bytes: bytes it needs; infinite if it runs out of memory, None if that
            is not known.
        room_bytes: bytes that may be used.
    """
    if needed_bytes is None:
        return  # the answer says why
    if math.isinf(needed_bytes):
        _print(f"{method}: {field} {value} runs out of memory")
        return
    fits = "fits" if needed_bytes <= room_bytes else "more than the margin leaves"
    size = format_bytes(int(needed_bytes))
    _print(f"{method}: {field} {value} needs {size}, {fits}")


def tell_plan(plan: MemoryPlan) -> None:
    """Print that a plan was made."""
    _print(f"{plan.method}: {plan.verdict}")


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"{MARK}{text}", file=sys.stderr, flush=True)
