"""Defaults of `meft-report check`, from `[tool.meft]` in a pyproject.toml.

    [tool.meft]
    baseline = "benchmarks/baselines/gate.jsonl"
    fail_on = ["saved:0", "peak_allocated:0", "peak_allocated:1%@sparse*"]

The file is that of the working directory, or of the nearest folder above it that has
one. Paths in it are relative to its folder. What the command line says goes first.
"""

import argparse
import tomllib
from pathlib import Path
from typing import Any

from meft_reports.errors import ReportError, UnknownName

FILE = "pyproject.toml"
KEYS = {"baseline": str, "fail_on": list}
"""Keys of the table, with their types."""


def completed(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments of `check` with defaults for what was not given.

    Raises:
        ReportError: there is no default either, or the table is wrong.
    """
    given = dict(vars(arguments))
    missing = [name for name in KEYS if given[name] is None]
    if missing:
        path, table = read()
        for name in missing:
            if name not in table:
                option = f"--{name.replace('_', '-')}"
                raise ReportError(
                    f"{option} is missing: give it, or `{name}` in [tool.meft] of "
                    f"{FILE}"
                )
            value = table[name]
            given[name] = path.parent / value if name == "baseline" else value
    return argparse.Namespace(**given)


def read() -> tuple[Path, dict[str, Any]]:
    """Return the nearest file and its table, which may be empty.

    Raises:
        ReportError: the file is not TOML, or a key or value of the table is wrong.
    """
    here = Path.cwd()
    found = (folder / FILE for folder in (here, *here.parents))
    path = next((path for path in found if path.is_file()), here / FILE)
    if not path.is_file():
        return path, {}
    try:
        tools = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"cannot read {path}: {error}") from error
    table = tools.get("meft", {}) if isinstance(tools, dict) else None
    if not isinstance(table, dict):
        raise ReportError(f"{path}: [tool.meft] is no table")
    for name, value in table.items():
        if name not in KEYS:
            raise ReportError(f"{path}: [tool.meft]: {UnknownName('key', name, KEYS)}")
        is_text = isinstance(value, str) and "\0" not in value
        if KEYS[name] is list:
            is_list = isinstance(value, list) and bool(value)
            is_text = is_list and all(isinstance(one, str) for one in value)
        if not is_text:
            words = "a list of texts" if KEYS[name] is list else "a text"
            raise ReportError(f"{path}: [tool.meft]: `{name}` should be {words}")
    return path, table
