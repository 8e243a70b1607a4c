"""Whether what a cell holds is still the content of the files of its user.

A sweep is read once and its cells may run for hours. A file that has changed since is
another cell, and the record of this one would be wrong.
"""

from collections.abc import Mapping
from pathlib import Path

from meft_bench.parent.own import backbones, methods, tasks
from meft_bench.shared.cell import Cell
from meft_bench.shared.own import Own

ANYWHERE = Path("/")
"""Places are absolute, and start at no folder."""


def why_not(cell: Cell, own: Mapping[str, Own]) -> str:
    """Return what has changed since the sweep was read, in one line; "" if nothing."""
    for value in (cell.method, cell.reference, cell.backbone, cell.task):
        one = own.get(value)
        if one is None or one.training:  # whose own cell is looked at
            continue
        try:
            now = _now(one)
        except (ValueError, OSError) as error:
            name = one.alias or one.spelt
            return f"{name} has changed since the sweep was read: {error}"
        if now != value:
            return (
                f"{one.alias or one.spelt} has changed since the sweep was read: run "
                "the same command again, for its new content"
            )
    return ""


def _now(one: Own) -> str | None:
    """Return what a cell would hold now."""
    found: Own | None
    if one.rows is not None:
        table = {key: v for key, v in one.rows.items() if key != "digests"}
        found = tasks.in_full(table, ANYWHERE)
    else:
        found = methods.find(one.place, ANYWHERE) or backbones.find(one.place, ANYWHERE)
    return None if found is None else found.value
