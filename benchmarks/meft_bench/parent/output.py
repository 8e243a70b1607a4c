"""Output of a command, including closed pipes and full disks.

Text is written to a pipe only when a buffer is full or the process ends, so a closed
pipe or a full disk would otherwise be detected after `main` has returned.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

EXIT_USAGE = 2
"""Exit code if the command, or a file that it names, is wrong."""
EXIT_CLOSED = 141
"""Exit code if the reader closed the output, as `head` does.

A shell reports this code for SIGPIPE.
"""


def prepare() -> None:
    """Make any text printable, and printing possible where a stream is closed."""
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
    """Print the summary of a run; it is lost where stdout cannot be written.

    The records are on disk, and the exit code depends on the cells only.
    """
    try:
        print(*lines, sep="\n", flush=True)
    except OSError:
        forget(sys.stdout)


def forget(stream: TextIO) -> None:
    """Drop unwritten text, so that Python does not try again when it exits."""
    with contextlib.suppress(OSError):  # a stream without a file has nothing to drop
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
