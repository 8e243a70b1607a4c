"""Entry points: the names that installed packages add to the suite.

    [project.entry-points."meft_bench.methods"]
    galore = "my_package.methods:galore"

A package adds methods, tasks and metrics under a name each, which a sweep uses like one
of ours. Nothing is imported to find them.
"""

import functools
import importlib.metadata

GROUPS = {
    "method": "meft_bench.methods",
    "task": "meft_bench.tasks",
    "metric": "meft_bench.metrics",
}


def find(kind: str, name: str) -> str | None:
    """Return `python:MODULE:NAME` of an entry point; None if there is none.

    Raises:
        ValueError: two packages have it, or it is not MODULE:NAME.
    """
    places = {value for key, value in _entry_points(kind) if key == name}
    if len(places) > 1:
        raise ValueError(
            f"{kind} {name!r} is an entry point of two packages, "
            f"{' and '.join(sorted(places))}: name one as python:MODULE:FUNCTION"
        )
    return f"python:{places.pop()}" if places else None


def names(kind: str) -> list[str]:
    """Return the names of all entry points of a kind."""
    return sorted({name for name, _ in _entry_points(kind)})


@functools.cache
def _entry_points(kind: str) -> tuple[tuple[str, str], ...]:
    group = GROUPS.get(kind)
    if group is None:
        return ()
    found = importlib.metadata.entry_points(group=group)
    return tuple((one.name, f"{one.module}:{one.attr}") for one in found)
