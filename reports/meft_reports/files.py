"""Files appear whole or not at all: written beside their place, then renamed into it.

A reader never sees half a file, and a command that fails leaves the old one as it was.
"""

import os
import tempfile
from pathlib import Path

from meft_reports.errors import ReportError


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`, replacing what was there in one step.

    A link is followed. A device or a pipe, such as `/dev/stdout`, is written to: it has
    no content to keep, and a file must not take its place.

    Raises:
        ReportError: the folder does not exist or cannot be written to, or there is no
            room; what was at `path` is still there.
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
        # mkstemp makes private files; a report is for whoever may read the folder.
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
