"""Host memory: what is free for cells, and what a child and its processes hold.

    free = min(MemAvailable of the machine,
               limit - usage + reclaimable page cache of the control group)
    held = sum over the processes of a group of anonymous and shared memory

Pages of files do not count as held, as the kernel can drop them. A page that several
processes have, as forks do, counts in parts. Both are for Linux, with control groups of
version 2; elsewhere nothing is known.
"""

import time
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
GROUP = Path("/sys/fs/cgroup")
"""The control group of this process, where a container has one of its own."""
_LOOK_SECONDS = 0.5


class TooLargeError(Exception):
    """Raised where the processes of a child hold more host memory than they may."""


class Watch:
    """Look from time to time whether the processes of a child hold too much.

    Args:
        limit_bytes: the most that they may hold; None for no limit.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self._limit_bytes = limit_bytes
        self._next = time.monotonic()

    def look(self, group: int) -> None:
        """Look, unless that was done less than half a second ago.

        Args:
            group: id of the process group of the child.

        Raises:
            TooLargeError: they hold too much.
        """
        if self._limit_bytes is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LOOK_SECONDS
        if exceeds(group, self._limit_bytes):
            raise TooLargeError


def free_bytes() -> int | None:
    """Return the bytes that processes can still take; None if that is not known."""
    machine = _fields(PROC / "meminfo").get("MemAvailable")
    if machine is None:
        return None
    most, used = _number(GROUP / "memory.max"), _number(GROUP / "memory.current")
    if most is None or used is None:
        return machine
    cache = _words(GROUP / "memory.stat").get("inactive_file", 0)
    return max(0, min(machine, most - used + cache))


def held_bytes(group: int) -> int:
    """Return the bytes that the processes of a group hold; 0 where it is not known.

    Args:
        group: id of the process group.
    """
    found = 0
    for process in _processes(group):
        its = _fields(process / "smaps_rollup")
        found += its.get("Pss_Anon", 0) + its.get("Pss_Shmem", 0)
    return found


def exceeds(group: int, limit_bytes: int) -> bool:
    """Return whether the processes of a group hold more than some bytes.

    It takes less time than `held_bytes` unless they may.
    """
    most = 0
    for process in _processes(group):
        its = _fields(process / "status")
        most += its.get("RssAnon", 0) + its.get("RssShmem", 0)
    return most > limit_bytes and held_bytes(group) > limit_bytes


def _processes(group: int) -> Iterator[Path]:
    for process in PROC.glob("[0-9]*"):
        try:
            text = (process / "stat").read_text(errors="replace")
        except OSError:  # it has just ended
            continue
        if int(text.rpartition(")")[2].split()[2]) == group:
            yield process


def _fields(path: Path) -> dict[str, int]:
    """Return the sizes in a file of `NAME: NUMBER kB` lines, in bytes, by name."""
    return {
        name.removesuffix(":"): number * 1024
        for name, number in _words(path).items()
        if name.endswith(":")
    }


def _words(path: Path) -> dict[str, int]:
    """Return the numbers in a file by the words before them; none without a file."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.split()[:2] for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if pair[1:] and pair[1].isdecimal()}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
