"""What a step that ran out of memory needed at least, from the message of its error.

    at least = allocated + requested

Torch writes both numbers, as do predictions of a virtual GPU; a message without them
says nothing.
"""

import re

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = r"([\d,]+(?:\.\d+)?) (bytes|KiB|MiB|GiB)"
_REQUESTED = (
    re.compile(rf"a request of {_SIZE}"),
    re.compile(rf"Tried to allocate {_SIZE}"),
)
_ALLOCATED = (
    re.compile(rf"{_SIZE} are allocated"),
    re.compile(rf"the allocated memory {_SIZE}"),
    re.compile(rf"{_SIZE} is allocated by PyTorch"),
)


def at_least_bytes(message: str) -> int | None:
    """Return the bytes that the step needed at least; None if the message lacks them.

    Numbers of a message are rounded; the result is exact to their last digit.
    """
    requested, allocated = _first(_REQUESTED, message), _first(_ALLOCATED, message)
    if requested is None or allocated is None:
        return None
    return requested + allocated


def _first(patterns: tuple[re.Pattern[str], ...], message: str) -> int | None:
    for pattern in patterns:
        if found := pattern.search(message):
            return round(float(found[1].replace(",", "")) * _UNITS[found[2]])
    return None
