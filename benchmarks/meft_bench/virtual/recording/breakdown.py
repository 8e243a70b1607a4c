"""The breakdown of a peak that a record keeps: `meft_bench.shared.breakdown`."""

import re
from collections import Counter
from typing import Any

from meft_bench.virtual.recording.trace import Storage, Trace

NUM_ROWS = 40
STAY = frozenset(
    {"parameters", "frozen", "buffers", "optimizer", "libraries", "unattributed"}
)
"""Kinds of memory that are there between two steps."""
WORKSPACE = "workspace"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

Key = tuple[str, str, str, str, str, tuple[int, ...]]


def breakdown(trace: Trace, start: int) -> dict[str, Any]:
    """Return what the highest moment of a step consists of, and what was saved.

    Args:
        trace: the recording.
        start: time in operators at which the step began.
    """
    peak = trace.peak(start=start)
    sums = _Sums(trace, start)
    for storage in peak.alive:
        sums.add(storage)
    if workspace := peak.by_kind.get(WORKSPACE, 0):
        phase = _phase(trace, peak.time)
        sums.put((WORKSPACE, phase, "", "", "", ()), workspace, peak.time)
    rows, other_bytes = sums.rows()
    saved = _Sums(trace, start)
    for storage in _saved(trace, start):
        saved.add(storage)
    saved_rows, saved_other_bytes = saved.rows()
    last = trace.events[-1].time if trace.events else start
    return {
        "peak_bytes": peak.num_bytes,
        "at_op": max(peak.time - start, 0),
        "num_ops": max(last - start, 0),
        "phase": _phase(trace, peak.time),
        "rows": rows,
        "other_bytes": other_bytes,
        "saved_bytes": saved.num_bytes.total(),
        "saved_rows": saved_rows,
        "saved_other_bytes": saved_other_bytes,
    }


class _Sums:
    """Sums of storages by what they agree in.

    Args:
        trace: the recording.
        start: time at which operators begin to be counted.
    """

    def __init__(self, trace: Trace, start: int) -> None:
        self._trace = trace
        self._start = start
        self.num_bytes: Counter[Key] = Counter()
        self._counts: Counter[Key] = Counter()
        self._first: dict[Key, int] = {}

    def add(self, storage: Storage) -> None:
        """Add a storage."""
        key = _key(self._trace.kind_of(storage), storage)
        self.put(key, self._trace.rounded(storage.num_bytes), storage.born)

    def put(self, key: Key, num_bytes: int, born: int) -> None:
        """Add bytes that were allocated at a time.

        Args:
            key: what storages of one row agree in.
            num_bytes: size of the storage.
            born: operator that allocated it, counted from the beginning.
        """
        self.num_bytes[key] += num_bytes
        self._counts[key] += 1
        self._first[key] = min(self._first.get(key, born), born)

    def rows(self) -> tuple[list[list[Any]], int]:
        """Return the largest rows, and the bytes of the others."""
        sizes = self.num_bytes
        # Among equals by name, so that the order is the same in every process.
        order = sorted(sizes, key=lambda key: (-sizes[key], key))
        rows = [
            [*key[:-1], list(key[-1]), sizes[key], self._counts[key], self._at(key)]
            for key in order[:NUM_ROWS]
        ]
        return rows, sum(sizes[key] for key in order[NUM_ROWS:])

    def _at(self, key: Key) -> int:
        """Return the operator of the step that made the first storage of a row."""
        return 0 if key[0] in STAY else max(self._first[key] - self._start, 0)


def _saved(trace: Trace, start: int) -> list[Storage]:
    """Return what one forward after `start` kept for its backward: the most."""
    found: dict[int, list[Storage]] = {}
    for storage in trace.storages:
        is_here = storage.born > start and storage.device == trace.accelerator
        if is_here and trace.kind_of(storage) == "saved":
            found.setdefault(trace.forward_of(storage), []).append(storage)
    sizes = {at: sum(s.num_bytes for s in its) for at, its in found.items()}
    return found[max(sizes, key=lambda at: sizes[at])] if sizes else []


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
