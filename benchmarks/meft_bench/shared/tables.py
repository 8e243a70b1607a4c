"""The tables of methods, measurements and backbones, which are data of this package."""

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from meft_bench.shared.field_kinds import TABLE_NAME, FieldKind, one_of

METHODS = "methods.toml"
MEASUREMENTS = "measurements.toml"
BACKBONES = "backbones.toml"
FILES = (METHODS, MEASUREMENTS, BACKBONES)
MAX_LENGTH = 60
"""Number of characters of a wrong value that a message shows."""


class TableError(ValueError):
    """Raised if a file of tables is wrong; the message is one line."""


def path_of(package: Path, file: str) -> Path:
    """Return the path of a table that belongs to a copy of `meft_bench`.

    A wheel carries the file inside the package; a checkout has it next to it.
    """
    inside = package / file
    return inside if inside.is_file() else package.parent / file


def read(
    file: str, required: Collection[str], schema: Mapping[str, FieldKind]
) -> dict[str, dict[str, Any]]:
    """Read one of `FILES`.

    Args:
        file: the name of the file.
        required: the fields that every table has.
        schema: what each field may hold, by its name.

    Returns:
        The fields of each table by its name, in the order of the file.

    Raises:
        TableError: the file cannot be read or is empty, or a table has an unknown
            field, lacks a required one, or has a value of another kind; names the file
            and the place.
    """
    path = path_in_use(file)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TableError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise TableError(f"{path}: {error}") from error
    except RecursionError as error:
        raise TableError(f"{path}: values are nested too deeply") from error
    if not tables:
        raise TableError(f"{path}: no tables; write one as [NAME]")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise TableError(f"{path}: {name!r} is not a table")
        wrong = [key for key in table if key not in schema]
        missing = [key for key in required if key not in table]
        if wrong or missing:
            what = f"unknown field {wrong[0]!r}" if wrong else f"no `{missing[0]}`"
            valid = ", ".join(sorted(schema))
            raise TableError(f"{path}: [{name}]: {what}; fields are {valid}")
        for key, value in table.items():
            kind = one_of(tables) if schema[key] is TABLE_NAME else schema[key]
            if not kind.fits(value):
                raise wrong_value(file, name, key, value, kind.words)
    return tables


def path_in_use(file: str) -> Path:
    """Return the path of a table that belongs to this package."""
    return path_of(Path(__file__).parents[1], file)


def wrong_value(
    file: str, table: str, field: str, value: Any, words: str
) -> TableError:
    """Return the error of a field that holds something else than it should.

    Args:
        file: the name of the file.
        table: the name of the table.
        field: the name of the field.
        value: what the field holds.
        words: what it should hold.
    """
    given = repr(value)
    if len(given) > MAX_LENGTH:
        given = f"{given[:MAX_LENGTH]}…"
    return TableError(
        f"{path_in_use(file)}: [{table}]: `{field}` = {given} should be {words}"
    )
