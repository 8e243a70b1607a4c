"""Compare what a test took with its baseline, and word the difference."""

import dataclasses
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_bench.pytest_plugin.baselines import Entry
from meft_bench.pytest_plugin.marker import Wanted
from meft_bench.shared.units import format_bytes

WORDS = {"saved_bytes": "saved", "peak_allocated_bytes": "peak_allocated"}
NUM_CHANGES = 5
NUM_ROWS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What a test took.

    Attributes:
        path: the file of the test.
        name: the test in it.
        device: name of its device.
        seen: what was measured, in order.
        started_at: when it was measured, UTC, ISO 8601.
        wanted: what the marker says; None without one.
    """

    path: Path
    name: str
    device: str
    seen: list[Any]
    started_at: str
    wanted: Wanted | None

    @property
    def place(self) -> str:
        """The test as pytest names it, from the folder in which pytest runs."""
        path = self.path
        if path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
        return f"{path}::{self.name}"

    @property
    def key(self) -> str:
        """What the numbers depend on."""
        return key_of(self.device)

    @property
    def entry(self) -> Entry:
        """What a baseline keeps of it."""
        return [dataclasses.asdict(one) for one in self.seen]

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            "path": str(self.path),
            "name": self.name,
            "key": self.key,
            "entry": self.entry,
            "started_at": self.started_at,
            "is_checked": self.wanted is not None,
        }


def key_of(device: str) -> str:
    """Return what the numbers of a device depend on, besides the code."""
    version = importlib.metadata.version("torch").partition("+")[0]
    return f"torch {version}, {device}"


def above_limit(entry: Entry, wanted: Wanted) -> str:
    """Return a failure if a peak is above the limit; empty otherwise."""
    for one in entry:
        peak, limit = one["peak_allocated_bytes"], wanted.limit_bytes
        if peak is None or limit is None or peak <= limit:
            continue
        rows = (one["memory_breakdown"] or {}).get("rows", [])
        listed = [
            f"  {format_bytes(row[6])}  {row[0]}  {row[2] or '(no module)'}  {row[3]}  "
            f"{row[4]} {row[5]}"
            for row in rows[:NUM_ROWS]
        ]
        head = (
            f"peak_allocated is {peak:,} bytes ({format_bytes(peak)}), above the limit "
            f"of {format_bytes(limit)}; the largest of it:"
        )
        return "\n".join([head, *listed])
    return ""


def differences(before: Entry, after: Entry, wanted: Wanted) -> str:
    """Return how a test takes more than its baseline allows; empty if it does not.

    Args:
        before: what the baseline has.
        after: what the test took.
        wanted: what the marker allows.
    """
    if len(before) != len(after):
        return (
            f"measured {_times(len(after))}, and its baseline has {_times(len(before))}"
        )
    lines: list[str] = []
    for was, now in zip(before, after, strict=True):
        for name, word in WORDS.items():
            allowed = getattr(wanted, word)
            old, new = was.get(name), now[name]
            if allowed is None or old == new:
                continue
            if old is None or new is None:
                lines.append(f"{word}: expected {old}, got {new}")
            elif new - old > allowed.of(old):
                share = f", {100 * (new - old) / old:+.2f} %" if old else ""
                lines += [
                    f"{word}: {old:,} → {new:,} bytes, +{new - old:,} "
                    f"({format_bytes(new - old)}{share}), allowed {allowed.text}",
                    *_what_grew(was, now, new - old, name == "saved_bytes"),
                ]
    if not lines:
        return ""
    return "\n".join(["takes more memory than its baseline", *lines])


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _what_grew(
    was: dict[str, Any], now: dict[str, Any], difference: int, is_saved: bool
) -> list[str]:
    """Return what of the memory grew, in lines."""
    old, new = was.get("memory_breakdown"), now["memory_breakdown"]
    if old is None or new is None:
        return []
    from meft_reports import breakdown

    before, after = (breakdown.read(one, "the baseline") for one in (old, new))
    growth = breakdown.what_grew(before, after, difference, is_saved=is_saved)
    return [f"  {line}" for line in growth.lines(NUM_CHANGES)]


def is_better(before: Entry, after: Entry) -> bool:
    """Return whether a test takes less than its baseline says."""
    return any(
        was.get(name) is not None and now[name] is not None and now[name] < was[name]
        for was, now in zip(before, after, strict=False)
        for name in WORDS
    )
