"""The tables of methods and of backbones, which are data of this package."""

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

METHODS, BACKBONES = "methods.toml", "backbones.toml"
FILES = (METHODS, BACKBONES)


def path_of(package: Path, file: str) -> Path:
    """Return the path of a table that belongs to a copy of `meft_bench`.

    A wheel carries the file inside the package; a checkout has it next to it.
    """
    inside = package / file
    return inside if inside.is_file() else package.parent / file


def read(file: str, required: str, known: Collection[str]) -> dict[str, dict[str, Any]]:
    """Read one of `FILES`.

    Args:
        file: the name of the file.
        required: the field that every table has.
        known: all fields that a table may have.

    Returns:
        The fields of each table by its name, in the order of the file.

    Raises:
        ValueError: a table has an unknown field, or lacks the required one.
    """
    path = path_of(Path(__file__).parents[1], file)
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    for name, table in tables.items():
        wrong = [key for key in table if key not in known]
        if wrong or required not in table:
            what = f"unknown field {wrong[0]!r}" if wrong else f"no `{required}`"
            valid = ", ".join(sorted(known))
            raise ValueError(f"{path}: [{name}]: {what}; fields are {valid}")
    return tables
