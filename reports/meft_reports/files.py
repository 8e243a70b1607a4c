"""Read files that may be compressed; write files atomically.

They are written into a temporary file in the same folder, which is then renamed.

A reader never reads an incomplete file, and a command that fails leaves the old one
unchanged.
"""

import contextlib
import gzip
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from meft_reports.errors import RecordError, ReportError


def read_whole(path: Path) -> bytes:
    """Return the content of a file of lines, which may be compressed (`.gz`).

    Raises:
        RecordError: it cannot be read.
    """
    with _opened(path) as file:
        return file.read()


def read_lines(path: Path) -> Iterator[bytes]:
    r"""Yield the lines of a file, which may be compressed (`.gz`), with what ends them.

    They end in `\n`, `\r\n` or `\r`, and the last one of a file that was not written
    completely in nothing.

    Raises:
        RecordError: it cannot be read.
    """
    with _opened(path) as file:
        for lines in file:
            yield from lines.splitlines(keepends=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        is_packed = path.suffix == ".gz"
        with cast(IO[bytes], (gzip.open if is_packed else open)(path, "rb")) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(f"cannot read {path}: not a whole gzip file") from error
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, replacing an existing file in one step.

    A link is followed. A device or a pipe, such as `/dev/stdout`, is written to
    directly: it has no content to keep, and a file must not replace it.

    Raises:
        ReportError: the folder does not exist or cannot be written to, or there is no
            room; an existing file at `path` is unchanged.
    """
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                file.write(content)
        else:
            _replace(path.resolve(), content)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror}") from error


def _replace(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".meft-report.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files, but all users of the folder may read a report.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    # The only portable way to read the mask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
