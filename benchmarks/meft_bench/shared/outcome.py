"""The outcome of a child, as the parent reads it.

It is one JSON object, written next to its destination and then renamed, so that an
existing file is complete:

    {"status": "ok" | "oom" | "error" | "skipped",
     "message": "",                      the reason, in a line; when ok a note, or empty
     "measurement": {...},               fields of `Measurement`
     "environment": {...},               some of `REPORTED`
     "memory_breakdown": {...} | null}   as `meft_bench.shared.breakdown` defines it

The other statuses are set by the parent: only it can detect that a child was killed or
took too long, or that there was no room for its outcome (`EXIT_UNWRITTEN`).
"""

import contextlib
import json
import os
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_bench.shared import breakdown, measurement
from meft_bench.shared.measurement import Measurement
from meft_bench.shared.record import Environment, Status

REPORTED = (
    "device_name",
    "prediction",
    "weights_origin",
    "weights_sha256",
    "data_origin",
    "num_threads",
)
"""Fields of `Environment` that the child determines."""

_STATUSES = (Status.OK, Status.OOM, Status.ERROR, Status.SKIPPED)
_KEYS = {"status", "message", "measurement", "environment", "memory_breakdown"}


EXIT_UNWRITTEN = 74
"""Exit status of a child that cannot write its outcome: EX_IOERR of sysexits.h."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Status and measurements, as the child reported them."""

    status: Status
    message: str
    measurement: Measurement
    environment: dict[str, Any]
    memory_breakdown: dict[str, Any] | None = None


def leave(path: Path, result: dict[str, object]) -> None:
    """Call `write` as the last action of a child; if it fails, end the process.

    The exit status is then `EXIT_UNWRITTEN`.
    """
    try:
        write(path, result)
    except OSError as error:
        with contextlib.suppress(OSError):  # the log may be on the same full disk
            print(f"{path}: {error.strerror}", file=sys.stderr, flush=True)
        # Without flushing: a log that cannot be written would change the exit status.
        os._exit(EXIT_UNWRITTEN)


def write(path: Path, result: dict[str, object]) -> None:
    """Write `result` to `path` atomically."""
    text = json.dumps(result, allow_nan=False)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def read(path: Path) -> Outcome:
    """Return the outcome in a file.

    Raises:
        FileNotFoundError: the child wrote none.
        ValueError: it does not have the form that this module describes.
    """
    try:
        table = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(table, dict) or table.keys() != _KEYS:
        raise ValueError(f"expected an object of {sorted(_KEYS)}")
    if table["status"] not in _STATUSES:
        raise ValueError(f"status {table['status']!r} is not a child's to give")
    if not isinstance(table["message"], str):
        raise ValueError("`message` is not text")
    _check_fields(table, "measurement", measurement.FIELDS)
    hints = typing.get_type_hints(Environment)
    _check_fields(table, "environment", {name: hints[name] for name in REPORTED})
    if table["memory_breakdown"] is not None:
        breakdown.check(table["memory_breakdown"])
    return Outcome(
        status=Status(table["status"]),
        message=" ".join(table["message"].split()),
        measurement=Measurement(**table["measurement"]),
        environment=table["environment"],
        memory_breakdown=table["memory_breakdown"],
    )


def _check_fields(table: dict[str, Any], key: str, hints: dict[str, Any]) -> None:
    if not isinstance(table[key], dict):
        raise ValueError(f"`{key}` is not an object")
    for name, value in table[key].items():
        if name not in hints:
            raise ValueError(f"`{key}` has an unknown field {name!r}")
        if not _fits(value, hints[name]):
            raise ValueError(f"`{key}.{name}` = {value!r} should be {hints[name]}")


def _fits(value: object, hint: Any) -> bool:
    """Return whether a JSON value fits a field's type; an integer fits a float."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return isinstance(value, list) and all(_fits(entry, item) for entry in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)
