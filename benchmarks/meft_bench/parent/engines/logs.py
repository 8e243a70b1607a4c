"""The log of a child: its last line, and the tail that a record keeps."""

import os
import re
import sys
from pathlib import Path

LINES, CHARACTERS = 20, 2000
"""The most that a record keeps of a log."""
_READ_BYTES = 64 * 2**10
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\))")
"""Sequences that move the cursor of a terminal, or change its colours or title."""
_TRACE = "USDT:"
"""How lines begin that torch's profiler prints each time it starts and stops."""


def last_line(log: Path) -> str:
    """Return the last printable line of a log; empty if there is none.

    Args:
        log: the file, which may be of any size.
    """
    lines = _lines(log)
    return lines[-1] if lines else ""


def tail(log: Path) -> str:
    """Return the last lines of a log, without what is not printable.

    A record is read on other machines: paths are relative to the working directory, or
    begin with `~` or, in the installation of Python, with `...`.

    Args:
        log: the file, which may be of any size.
    """
    text = "\n".join(_lines(log)[-LINES:])
    prefixes = {str(Path.cwd()): ".", str(Path.home()): "~"}
    prefixes |= {sys.prefix: "...", sys.base_prefix: "..."}
    for prefix in sorted(prefixes, key=len, reverse=True):
        if len(prefix) > 1:  # not the root
            text = text.replace(prefix + os.sep, prefixes[prefix] + os.sep)
    return text[-CHARACTERS:]


def _lines(log: Path) -> list[str]:
    """Return the printable lines at the end of a log; none of one that is gone."""
    if not log.is_file():  # the child can have removed or replaced it
        return []
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _READ_BYTES))
            content = file.read()
    except OSError:
        return []
    text = _ESCAPES.sub("", content.decode(errors="replace")).replace("\t", "    ")
    # A progress bar writes each of its states over the one before.
    shown = (line.rstrip().rpartition("\r")[2] for line in text.split("\n"))
    printable = ("".join(c for c in line if c.isprintable()).rstrip() for line in shown)
    return [line for line in printable if line.strip() and not line.startswith(_TRACE)]
