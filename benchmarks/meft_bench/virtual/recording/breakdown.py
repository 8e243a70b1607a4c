"""The breakdown of a peak that a record keeps: `meft_bench.shared.breakdown`."""

import re
from collections import Counter
from typing import Any

from meft_bench.virtual.recording.trace import Storage, Trace

NUM_ROWS = 40
STAY = frozenset({"parameters", "frozen", "buffers", "optimizer", "libraries"})
"""Kinds of memory that are there between two steps."""
WORKSPACE = "workspace"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

Key = tuple[str, str, str, str, str, tuple[int, ...]]


def breakdown(trace: Trace, start: int) -> dict[str, Any]:
    """Return what the highest moment of a step consists of.

    Args:
        trace: the recording.
        start: time in operators at which the step began.
    """
    peak = trace.peak(start=start)
    num_bytes: Counter[Key] = Counter()
    counts: Counter[Key] = Counter()
    first: dict[Key, int] = {}

    def add(key: Key, size: int, born: int) -> None:
        num_bytes[key] += size
        counts[key] += 1
        first[key] = min(first.get(key, born), born)

    for storage in peak.alive:
        key = _key(trace.kind_of(storage), storage)
        add(key, trace.rounded(storage.num_bytes), storage.born)
    if workspace := peak.by_kind.get(WORKSPACE, 0):
        add((WORKSPACE, _phase(trace, peak.time), "", "", "", ()), workspace, peak.time)
    # Among equals by name, so that the order is the same in every process.
    order = sorted(num_bytes, key=lambda key: (-num_bytes[key], key))[:NUM_ROWS]
    last = trace.events[-1].time if trace.events else start
    return {
        "peak_bytes": peak.num_bytes,
        "at_op": max(peak.time - start, 0),
        "num_ops": max(last - start, 0),
        "phase": _phase(trace, peak.time),
        "rows": [
            [
                *key[:-1],
                list(key[-1]),
                num_bytes[key],
                counts[key],
                0 if key[0] in STAY else max(first[key] - start, 0),
            ]
            for key in order
        ],
        "other_bytes": peak.num_bytes - sum(num_bytes[key] for key in order),
    }


def _key(kind: str, storage: Storage) -> Key:
    """Return what a storage must agree in with others of its row."""
    stays = kind in STAY
    return (
        kind,
        "" if stays else storage.phase,
        _NUMBER.sub("*", storage.module),
        "" if stays else storage.operator,
        storage.dtype,
        storage.shape,
    )


def _phase(trace: Trace, time: int) -> str:
    """Return the phase of the last allocation up to a time."""
    found = [storage.phase for storage in trace.storages if storage.born <= time]
    return found[-1] if found else ""
