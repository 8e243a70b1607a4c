"""Reads the data files that the reports share with the harness, such as `methods.toml`.

A wheel carries them in the harness's package; a checkout has them in `benchmarks`.
"""

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from meft_reports.errors import ReportError

METHODS, MEASUREMENTS = "methods.toml", "measurements.toml"


def read_tables(
    file: str, *, required: Collection[str], known: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Read one of the files.

    Args:
        file: the name of the file.
        required: the fields that every table has.
        known: all fields that a table may have.

    Returns:
        The fields of each table by its name, in the order of the file.

    Raises:
        ReportError: the file cannot be read, or a table has an unknown field, or lacks
            a required one; names the file and the place.
    """
    here = Path(__file__)
    installed = here.parents[1] / "meft_bench" / file
    path = installed if installed.is_file() else here.parents[2] / "benchmarks" / file
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ReportError(f"{path}: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ReportError(f"{path}: {name!r} is not a table")
        for key in table:
            if key not in known:
                valid = ", ".join(sorted(known))
                raise ReportError(
                    f"{path}: [{name}]: unknown field {key!r}; fields are {valid}"
                )
        for key in required:
            if key not in table:
                raise ReportError(f"{path}: [{name}]: no `{key}`")
    return tables
