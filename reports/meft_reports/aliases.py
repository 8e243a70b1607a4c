"""Short names of a user's methods, backbones and tasks, in the place of their digests.

A cell holds the digest of what is its user's own, `peft:lora-3f2a91bc0d12`, and its
record may hold a short name for it. Tables, figures and pages show the name; what joins
records, `cell_id`, keeps the digest. A name that two digests have, or that a method of
the suite has, is shown with the beginning of the digest.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from meft_reports.methods import TABLE

FIELDS = ("method", "reference", "backbone", "task")
"""Fields of a cell that can have a short name."""
DIGEST_LENGTH = 4
"""Number of characters of a digest that tell two things of one name apart."""

Record = dict[str, Any]


def with_aliases(records: Sequence[Record]) -> list[Record]:
    """Return records whose cells have short names where there are some.

    Args:
        records: valid records, the newest last for each name.
    """
    names = _names(records)
    if not names:
        return list(records)
    return [_renamed(record, names) for record in records]


def _names(records: Iterable[Record]) -> dict[str, str]:
    """Return what is shown by what a cell holds."""
    found: dict[str, str] = {}
    for record in records:
        aliases = record.get("aliases")
        for value, alias in aliases.items() if isinstance(aliases, dict) else ():
            if isinstance(alias, str) and alias:
                found[value] = alias
    given = list(found.values())
    return {
        value: (
            f"{alias}-{value.rpartition('-')[2][:DIGEST_LENGTH]}"
            if given.count(alias) > 1 or alias in TABLE
            else alias
        )
        for value, alias in found.items()
    }


def _renamed(record: Record, names: dict[str, str]) -> Record:
    cell = record["cell"]
    changes = {
        field: names[cell[field]] for field in FIELDS if cell.get(field) in names
    }
    return record | {"cell": cell | changes} if changes else record
