"""The tables of methods, measurements and backbones, which are data of this package."""

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

METHODS = "methods.toml"
MEASUREMENTS = "measurements.toml"
BACKBONES = "backbones.toml"
FILES = (METHODS, MEASUREMENTS, BACKBONES)


class TableError(ValueError):
    """Raised if a file of tables is wrong; the message is one line."""


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
        TableError: the file cannot be read, or a table has an unknown field, or lacks
            the required one; names the file and the place.
    """
    path = path_of(Path(__file__).parents[1], file)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TableError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise TableError(f"{path}: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise TableError(f"{path}: {name!r} is not a table")
        wrong = [key for key in table if key not in known]
        if wrong or required not in table:
            what = f"unknown field {wrong[0]!r}" if wrong else f"no `{required}`"
            valid = ", ".join(sorted(known))
            raise TableError(f"{path}: [{name}]: {what}; fields are {valid}")
    return tables
