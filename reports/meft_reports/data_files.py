"""Reads the data files that the reports share with the harness, such as `methods.toml`.

A wheel carries them in the harness's package; a checkout has them in `benchmarks`.
"""

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from meft_reports.errors import ReportError
from meft_reports.field_kinds import TABLE_NAME, FieldKind, one_of
from meft_reports.text import printable

METHODS, MEASUREMENTS = "methods.toml", "measurements.toml"


MAX_LENGTH = 60
"""Maximum number of characters of a wrong value in a message."""


def path_of(file: str) -> Path:
    """Return the path of one of the files."""
    here = Path(__file__)
    installed = here.parents[1] / "meft_bench" / file
    return installed if installed.is_file() else here.parents[2] / "benchmarks" / file


def read_tables(
    file: str, *, required: Collection[str], schema: Mapping[str, FieldKind]
) -> dict[str, dict[str, Any]]:
    """Read one of the files.

    Args:
        file: the name of the file.
        required: the fields that every table has.
        schema: what each field may hold, by its name.

    Returns:
        The fields of each table by its name, in the order of the file.

    Raises:
        ReportError: the file cannot be read or is empty, or a table has an unknown
            field, lacks a required one, or has a value of another kind; names the file
            and the place.
    """
    path = path_of(file)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ReportError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ReportError(f"{path}: values are nested too deeply") from error
    if not tables:
        raise ReportError(f"{path}: no tables; write one as [NAME]")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ReportError(f"{path}: {name!r} is not a table")
        wrong = [key for key in table if key not in schema]
        missing = [key for key in required if key not in table]
        if wrong or missing:
            what = f"unknown field {wrong[0]!r}" if wrong else f"no `{missing[0]}`"
            valid = ", ".join(sorted(schema))
            raise ReportError(f"{path}: [{name}]: {what}; fields are {valid}")
        for key, value in table.items():
            kind = one_of(tables) if schema[key] is TABLE_NAME else schema[key]
            if not kind.fits(value):
                raise ReportError(
                    f"{path}: [{name}]: `{key}` = "
                    f"{printable(repr(value), MAX_LENGTH)} should be {kind.words}"
                )
    return tables
