"""What the marker `meft_memory` of a test asks for."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest

from meft_bench.shared.units import parse_bytes

HELP = (
    "meft_memory(saved=0, peak_allocated=0, limit=None, device=None): compare what a "
    "test takes with its baseline. `saved` and `peak_allocated` say how much more is "
    'allowed (bytes, "1%", "5MiB", None for any), `limit` the most that the peak may '
    'be, `device` a virtual GPU ("virtual-H200")'
)
NAMES = ("saved", "peak_allocated", "limit", "device")
VIRTUAL = "virtual-"
SHARE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s?%", re.ASCII)
"""A share of what was before, as a decimal number."""
LIMIT = 'bytes, as 4096 or "2GiB", or None for any'
DIFFERENCE = 'bytes, as 0, 4096 or "5MiB", a share, as "1%" or "0.5%", or None for any'
"""What an argument should be, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The arguments of a marker.

    Attributes:
        saved: how much more may be saved for backward, a number of bytes or a share;
            None for any.
        peak_allocated: likewise of the peak.
        limit_bytes: the most bytes that the peak may have; None for any number.
        device: name of the device; "" for that of the model.
    """

    saved: "Allowed | None"
    peak_allocated: "Allowed | None"
    limit_bytes: int | None
    device: str

    @property
    def gpu(self) -> str:
        """Name of the virtual GPU; "" for none."""
        return self.device.removeprefix(VIRTUAL) if self.device else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowed:
    """A difference that is allowed: bytes, or a share of what was before."""

    amount: Fraction
    is_share: bool
    text: str

    def of(self, before: int) -> Fraction:
        """Return it in bytes."""
        return self.amount * before if self.is_share else self.amount


def of(item: pytest.Item) -> Wanted | None:
    """Return what the nearest marker of a test asks for; None without one.

    Raises:
        UsageError: an argument is wrong.
    """
    found = item.get_closest_marker("meft_memory")
    if found is None:
        return None
    where = f"{item.nodeid}: meft_memory"
    given = found.kwargs
    if found.args or given.keys() - {*NAMES}:
        unknown = ", ".join(map(repr, [*found.args, *sorted(given.keys() - {*NAMES})]))
        names = ", ".join(NAMES)
        raise pytest.UsageError(f"{where}: got {unknown}; it takes {names} by name")
    device = given.get("device") or ""
    is_virtual = isinstance(device, str) and device.startswith(VIRTUAL)
    if device and (not is_virtual or device == VIRTUAL):
        raise pytest.UsageError(
            f"{where}: device={device!r} should be a virtual GPU, such as "
            '"virtual-H200"; without it, tests run on the device of their model'
        )
    limit = given.get("limit")
    return Wanted(
        saved=_allowed(given.get("saved", 0), f"{where}: saved"),
        peak_allocated=_allowed(
            given.get("peak_allocated", 0), f"{where}: peak_allocated"
        ),
        limit_bytes=None if limit is None else _bytes(limit, f"{where}: limit", LIMIT),
        device=device,
    )


def _allowed(value: Any, where: str) -> Allowed | None:
    if value is None:
        return None
    share = SHARE.fullmatch(value) if isinstance(value, str) else None
    if share is not None:
        amount = Fraction(share[1]) / 100
        return Allowed(amount=amount, is_share=True, text=share[0])
    is_zero = type(value) is int and value == 0
    size = 0 if is_zero else _bytes(value, where, DIFFERENCE)
    return Allowed(amount=Fraction(size), is_share=False, text=str(value))


def _bytes(value: Any, where: str, expected: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    try:
        return parse_bytes(value)
    except (ValueError, TypeError):
        raise pytest.UsageError(f"{where}={value!r} should be {expected}") from None
