"""What a command prints, also where nobody reads it or there is no room for it.

Text is written to a pipe only when a buffer is full or the process ends, so a closed
pipe or a full disk would otherwise be noticed after `main` has returned.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

EXIT_CLOSED = 141
"""The reader of the output went away, as `head` does: what a shell makes of SIGPIPE."""


def prepare() -> None:
    """Let any text be printed, and printing work where a stream is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # as after `>&-`
            setattr(sys, name, Path(os.devnull).open("w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def complain(line: str) -> None:
    """Print a line on stderr; it is lost where stderr cannot be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        forget(sys.stderr)


def summarize(lines: Iterable[str]) -> None:
    """Print what a run came to; it is lost where stdout cannot be written.

    The records are on disk, and the exit code is of the cells.
    """
    try:
        print(*lines, sep="\n", flush=True)
    except OSError:
        forget(sys.stdout)


def forget(stream: TextIO) -> None:
    """Drop what could not be written, so that Python does not try again at its end."""
    with contextlib.suppress(OSError):  # a stream without a file has nothing to drop
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
