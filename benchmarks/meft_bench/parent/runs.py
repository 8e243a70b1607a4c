"""The records file: one line of JSON per cell that ended.

A line is appended atomically, and is on disk before the next cell's. An incomplete last
line of a killed writer is never read, and is cut off by the next append. A file that is
empty when it is closed is removed. There is one writer at a time: the file is locked
while a run has it open, and the kernel releases the lock when the process ends for any
reason.

The last record of a cell counts; earlier ones remain as history. Reports take the one
that started last, so no record starts before one of an earlier run: where a clock was
set back in between, it has the time of that one.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from meft_bench.shared import configs
from meft_bench.shared.cell import Cell
from meft_bench.shared.measurement import Measurement
from meft_bench.shared.record import Environment, Record, Status

LOSSES = "loss_curve"
"""The one list that is kept of a lean record: it tells whether a trial diverged."""
_VERSIONS: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
_COMMAND_LENGTH = 120
"""The most that is shown of the command line of another run."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers that mean that there is no room to write."""


class RunsError(Exception):
    """Raised if a records file cannot be read or written; the message is one line."""


def unusable(path: Path, error: OSError) -> RunsError:
    """Return the error of a run that writes to `path` for a failed system call."""
    message = f"{error.filename or path}: {error.strerror}"
    if error.errno in NO_ROOM:
        message += "; make room, and run the same command again to go on"
    return RunsError(message)


class RecordsFile:
    """A records file opened for appending, locked against other runs."""

    def __init__(self, path: Path) -> None:
        """Open `path`; create it and its folder if they do not exist.

        Raises:
            RunsError: another run has it open, it cannot be opened, or it contains
                something that is not a record.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_locked(path)
        except OSError as error:
            raise unusable(path, error) from error
        try:
            with path.open("rb") as lines:
                self.records = _parse(path, lines, lean=True)
                self._end = lines.tell()
                lines.seek(max(0, self._end - 1))
                self._lacks_newline = lines.read(1) not in (b"", b"\n")
            size = path.stat().st_size
        except OSError as error:
            os.close(self._file)
            raise unusable(path, error) from error
        except BaseException:
            os.close(self._file)
            raise
        self.is_torn = self._end < size
        """Whether the last line was incomplete, and is ignored."""
        times = [record.started_at for record in self.records]
        self.newest = max(times, key=_time, default="")
        """When the last record of earlier runs started; "" if there is none."""

    @property
    def is_ahead(self) -> bool:
        """Whether a record of an earlier run starts later than the clock shows."""
        return bool(self.newest) and _time(self.newest) > datetime.now(UTC)

    def append(self, record: Record) -> None:
        """Append one record and wait until it is on disk.

        Raises:
            RunsError: there is no room for it; the file keeps its complete records.
        """
        if self.newest and _time(record.started_at) < _time(self.newest):
            record = dataclasses.replace(record, started_at=self.newest)
        text = json.dumps(record.to_json(), ensure_ascii=False)
        # A lone surrogate, of a file name that is not text, is written as a JSON
        # escape.
        line = text.encode(errors="backslashreplace") + b"\n"
        if self._lacks_newline:  # of the last line, as some editors leave it
            line = b"\n" + line
        try:
            os.ftruncate(self._file, self._end)
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
            os.fsync(self._file)
        except OSError as error:
            self._cut()
            raise unusable(self._path, error) from error
        self._end += len(line)
        self._lacks_newline = False
        self.records.append(_lean(record))

    def _cut(self) -> None:
        """Remove an incomplete record that could not be appended."""
        with contextlib.suppress(OSError):  # it is not read, and cut off later
            os.ftruncate(self._file, self._end)

    def close(self) -> None:
        """Close the file and release its lock; remove an empty file."""
        with contextlib.suppress(OSError):
            is_empty = os.fstat(self._file).st_size == 0
            if is_empty and _is_at(self._path, self._file):
                self._path.unlink()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _time(text: str) -> datetime:
    """Return the time that a record holds; the earliest one for other text."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _open_locked(path: Path) -> int:
    """Open and lock the file; create it if it does not exist.

    Raises:
        RunsError: another run has it open.
        OSError: it cannot be opened.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between the two calls, a run without records may have removed the file.
            if path.is_symlink() or _is_at(path, file):
                return file
        except BlockingIOError as error:
            who = _holder(file)
            os.close(file)
            raise RunsError(
                f"{path}: another run is writing to it{who}; wait for it to end, "
                "or give this one a file of its own with -o"
            ) from error
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _holder(file: int) -> str:
    """Return which process of this machine has a file locked; "" if none is known.

    Args:
        file: descriptor of the file.
    """
    here = os.fstat(file)
    with contextlib.suppress(OSError):  # not Linux, or a process of another user
        lines = Path("/proc/locks").read_text().splitlines()
        # Such as `1: FLOCK ADVISORY WRITE 4711 08:01:131 0 EOF`.
        for words in map(str.split, lines):
            if words[1] != "FLOCK" or words[5].rpartition(":")[2] != str(here.st_ino):
                continue
            process = Path("/proc", words[4])
            if any(os.path.samestat(here, fd.stat()) for fd in _files(process)):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                said = " ".join(command.decode(errors="replace").split())
                return f", process {words[4]} (`{said[:_COMMAND_LENGTH]}`)"
    return ""


def _files(process: Path) -> Iterator[Path]:
    """Yield what a process has open, of what still exists."""
    for file in (process / "fd").iterdir():
        if file.exists():
            yield file


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(file))
    except FileNotFoundError:
        return False


def read(path: Path, *, lean: bool = False) -> list[Record]:
    """Return the records in a file, oldest first; empty when there is no file.

    Args:
        path: the file.
        lean: whether breakdowns, logs and lists of numbers are left out, which are most
            of a record, and which nothing needs that asks which cells are done.

    Raises:
        RunsError: it cannot be read, or a line of it is not a record.
    """
    try:
        with path.open("rb") as lines:
            return _parse(path, lines, lean=lean)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unusable(path, error) from error


def done(
    records: Iterable[Record],
    cells: Iterable[Cell],
    environments: Mapping[str, Environment],
) -> dict[Cell, Record]:
    """Return those of `cells` that need not run again: those that have ended well.

    Arguments and result are those of `ended`.
    """
    found = ended(records, cells, environments)
    return {
        cell: record for cell, record in found.items() if record.status == Status.OK
    }


def ended(
    records: Iterable[Record],
    cells: Iterable[Cell],
    environments: Mapping[str, Environment],
) -> dict[Cell, Record]:
    """Return those of `cells` that have ended in a way that counts, with their records.

    A cell has ended when its last record on this class of machine comes from the same
    code, the same versions of all packages and, for a backbone of random weights, the
    same config file, and when no machine has run the cell with other code since. An
    earlier record of the same code does not count: if the code is changed and changed
    back, the cell runs again, so that its last record is that of the current code.

    Args:
        records: all records of the file, oldest first.
        cells: the cells of a run.
        environments: the environments of the run, by `Cell.device`.

    Returns:
        Records by cell.
    """
    last: dict[tuple[Cell, str], Record] = {}
    last_code: dict[Cell, str] = {}
    for record in records:
        last[record.cell, record.environment.machine] = record
        last_code[record.cell] = record.environment.code_sha256
    found = {}
    for cell in cells:
        here = environments[cell.device]
        its = last.get((cell, here.machine))
        if (
            its is not None
            and its.environment.versions == here.versions
            and its.environment.code_sha256 == here.code_sha256 == last_code[cell]
            and configs.digest(cell.backbone) in (None, its.environment.weights_sha256)
        ):
            found[cell] = its
    return found


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; raise for a name that is in it twice.

    Python would otherwise keep the last value.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is in one object twice")
    return found


def _parse(path: Path, lines: BinaryIO, *, lean: bool) -> list[Record]:
    """Return the records of a file, and stop at a last line that is half written."""
    records = []
    number = 0
    while line := lines.readline():
        number += 1
        if not line.strip():
            continue
        is_last = not line.endswith(b"\n")
        # Of a killed run or, in zeros, of a loss of power: other text is another's.
        may_be_ours = line.strip(b"\0 \t\r\n")[:1] in (b"", b"{")
        if is_last and may_be_ours and not _is_json(line):
            lines.seek(-len(line), os.SEEK_CUR)  # half written
            break
        try:
            found = json.loads(line, object_pairs_hook=_refuse_duplicates)
            record = Record.from_json(found)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,  # of lists in lists
        ) as error:
            reason = " ".join(str(error).split())
            raise RunsError(
                f"{path}: line {number} is not a record ({reason}); "
                "delete the line or use another file"
            ) from error
        records.append(_lean(record) if lean else record)
    return records


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _lean(record: Record) -> Record:
    """Return a record without its breakdown, its log and its lists of numbers."""
    numbers = record.measurement.to_json()
    short = {
        name: value
        for name, value in numbers.items()
        if value is not None and (name == LOSSES or not isinstance(value, list))
    }
    return dataclasses.replace(
        record,
        measurement=Measurement(**short),
        environment=_one_of_each(record.environment),
        memory_breakdown=None,
        log_tail=None,
    )


def _one_of_each(environment: Environment) -> Environment:
    """Return an environment that shares its versions with all that have the same."""
    versions = environment.versions
    shared = _VERSIONS.setdefault(tuple(versions.items()), versions)
    return dataclasses.replace(environment, versions=shared)
