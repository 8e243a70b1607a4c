"""Options of the command line and of the ini file."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

UPDATES = ("create", "fix", "trim")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the user asks for.

    Attributes:
        update: which of `UPDATES` to make of baselines.
        reason: why baselines change, which those keep that do; "" for none.
        records: where to write what tests took, as JSON lines; None for nowhere.
        checks: whether tests are compared with baselines.
        folder: name of the folder with the baselines, beside the tests.
        is_strict: whether a baseline of another torch or device is a failure.
    """

    update: frozenset[str]
    reason: str
    records: Path | None
    checks: bool
    folder: str
    is_strict: bool


def add(parser: pytest.Parser) -> None:
    """Add the options to pytest's parser."""
    group = parser.getgroup("meft", "memory of training steps")
    group.addoption(
        "--meft-update",
        default="",
        metavar="create,fix,trim",
        help="update baselines of memory: create missing ones, fix those that differ, "
        "trim those of tests that are gone",
    )
    group.addoption(
        "--meft-reason",
        default="",
        metavar="TEXT",
        help="why baselines change; it is kept in those that --meft-update creates or "
        "fixes",
    )
    group.addoption(
        "--meft-records",
        type=Path,
        metavar="PATH",
        help="write what each test took, as JSON lines",
    )
    group.addoption(
        "--meft-no-check",
        action="store_true",
        help="measure memory, but compare it with no baseline",
    )
    parser.addini(
        "meft_baseline_dir",
        "folder of the baselines of memory, beside each file of tests",
        default="__meft__",
    )
    parser.addini(
        "meft_strict",
        "fail, and do not skip, where a baseline is of another torch or device",
        type="bool",
        default=False,
    )


def read(config: pytest.Config) -> Options:
    """Return the options.

    Raises:
        UsageError: there is no such update, or it is refused; or there is a reason
            without one; or records could not be written.
    """
    text: str = config.getoption("--meft-update")
    update = frozenset(filter(None, text.replace(" ", "").split(",")))
    if unknown := update - {*UPDATES}:
        raise pytest.UsageError(
            f"--meft-update={text}: {', '.join(sorted(unknown))} is none of "
            f"{', '.join(UPDATES)}"
        )
    if update and os.environ.get("CI"):
        raise pytest.UsageError(
            "--meft-update is refused under CI, where a baseline that updates itself "
            "checks nothing: run it on your machine, and commit the files"
        )
    reason: str = config.getoption("--meft-reason").strip()
    if reason and not update & {"create", "fix"}:
        raise pytest.UsageError(
            "--meft-reason is kept in baselines that --meft-update=create or "
            "--meft-update=fix writes: give one of them, too"
        )
    records: Path | None = config.getoption("--meft-records")
    if records is not None and (records.is_dir() or not records.parent.is_dir()):
        raise pytest.UsageError(
            f"--meft-records={records}: no file can be written there; its folder must "
            "exist, and it must be no folder itself"
        )
    return Options(
        update=update,
        reason=reason,
        records=records,
        checks=not config.getoption("--meft-no-check"),
        folder=config.getini("meft_baseline_dir"),
        is_strict=config.getini("meft_strict"),
    )
