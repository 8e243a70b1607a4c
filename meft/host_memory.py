"""Available host memory of this process, by Linux and its cgroups.

    available = min(MemAvailable of the machine,
                    limit - usage + reclaimable page cache of every enclosing cgroup)

A container's limit is one of the latter. An allocation beyond it is not refused: the
process is killed once the pages are written to.
"""

from pathlib import Path

from meft.replaceable import Replaceable


@Replaceable
def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the number of bytes that can still be allocated and used.

    Args:
        root: root of the file system, for tests.

    Returns:
        The bytes; None if the system does not report them.
    """
    found = [_of_machine(root / "proc/meminfo"), *_of_cgroups(root)]
    known = [number for number in found if number is not None]
    return max(min(known), 0) if known else None


def _of_machine(path: Path) -> int | None:
    kilobytes = _field(path, "MemAvailable:")
    return None if kilobytes is None else kilobytes * 1024


def _of_cgroups(root: Path) -> list[int | None]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            mount = root / "sys/fs/cgroup"
            files = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            files = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        here = mount / name.lstrip("/")
        # In a container, the name may refer to the host's tree and not exist here.
        groups = [here, *here.parents] if here.exists() else [mount]
        found += [_of_cgroup(g, *files) for g in groups if g.is_relative_to(mount)]
    return found


def _of_cgroup(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    most, used = _number(group / limit), _number(group / usage)
    if most is None or used is None:
        return None
    return most - used + (_field(group / "memory.stat", reclaimable) or 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return None
