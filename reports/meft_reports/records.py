"""Read files of JSON lines and return one valid record per cell.

`valid_records` checks each record; `latest` selects the record of a cell that counts.
Times of a cell that shared its GPU with another one are left out: nothing can be
compared with them.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from meft_reports import breakdown, commits
from meft_reports.breakdown import Breakdown
from meft_reports.contaminated import leave_out_shared
from meft_reports.errors import RecordError
from meft_reports.files import read_lines
from meft_reports.latest import FAILED, code_of, counting, in_order, newest_code
from meft_reports.text import SHORT_LENGTH, plural, printable
from meft_reports.valid_records import Record, quoted, validate

NOTE_LENGTH = 10_000
"""Maximum number of characters of a note."""


def read_records(
    paths: Sequence[Path], commit: str | None = None, *, breakdowns: bool = True
) -> tuple[list[Record], str]:
    """Return the records that count, sorted by `cell_id`, and the newest code.

    There is one record per cell.

    Args:
        paths: files of runs.
        commit: the start of a commit of the measured project, of which alone records
            are taken; None for all.
        breakdowns: whether breakdowns of memory are kept, which are most of a record.

    Raises:
        RecordError: a file is missing, holds no record, or has a line that is not a
            record of this schema version; names the file and the line.
    """
    found = read_all(paths, breakdowns=breakdowns)
    ordered = in_order(found if commit is None else _of_commit(found, commit))
    winners, newest = counting(ordered), newest_code(ordered)
    _note_left_out(ordered, winners, newest)
    return winners, newest


def _of_commit(records: Sequence[Record], commit: str) -> list[Record]:
    """Return the records of a commit.

    Raises:
        RecordError: there is none, or several commits start so.
    """
    known = dict.fromkeys(str(commits.measured(record)[0]) for record in records)
    fitting = [one for one in known if one.startswith(commit)]
    if len(fitting) != 1:
        shown = ", ".join(one[: commits.LENGTH] for one in known)
        what = "no record is" if not fitting else "records of several commits are"
        raise RecordError(
            f"{what} of commit {quoted(commit)}; those of the file are of {shown}"
        )
    return [one for one in records if commits.measured(one)[0] == fitting[0]]


def read_all(paths: Sequence[Path], *, breakdowns: bool = True) -> list[Record]:
    """Return every record of some files, several of a cell.

    Args:
        paths: files of runs.
        breakdowns: whether breakdowns of memory are kept.

    Raises:
        RecordError: see `read_records`.
    """
    return [record for path in paths for record in _some(path, breakdowns)]


def _some(path: Path, breakdowns: bool) -> list[Record]:
    """Return the records of a file of a run, which holds at least one."""
    records = []
    for _, record in _lines_of(path, is_finished=False):
        if not breakdowns:
            record["memory_breakdown"] = None
        records.append(record)
    if not records:
        raise RecordError(f"{path} holds no record; run a sweep into it first")
    return records


def read_baseline(path: Path) -> list[Record]:
    """Return the records of a baseline, sorted by `cell_id`.

    A baseline is written completely and contains each cell once. Anything else in it,
    such as half a line or both sides of a merge, would make the check less strict.

    Raises:
        RecordError: see `read_records`; or the last line is incomplete, or a cell is in
            two lines.
    """
    lines: dict[str, tuple[int, Record]] = {}
    for number, record in _lines_of(path, is_finished=True):
        cell_id = record["cell_id"]
        if cell_id in lines:
            raise RecordError(
                f"{path}, line {number}: the cell of line {lines[cell_id][0]} again; a "
                "baseline holds each cell once, as `meft-report baseline` writes it"
            )
        lines[cell_id] = number, record
    if not lines:
        raise RecordError(
            f"{path} holds no record; write it with `meft-report baseline`"
        )
    return [lines[cell_id][1] for cell_id in sorted(lines)]


def breakdowns_of(records: Sequence[Record]) -> dict[str, Breakdown]:
    """Return what the peak of each cell consists of, where its record says so."""
    return {
        record["cell_id"]: record["memory_breakdown"]
        for record in records
        if record.get("memory_breakdown") is not None
    }


def _note_left_out(ordered: list[Record], winners: list[Record], newest: str) -> None:
    num_left_out = len(ordered) - len(winners)
    if num_left_out:
        num_failed = sum(record["status"] in FAILED for record in ordered) - sum(
            record["status"] in FAILED for record in winners
        )
        failures = f", {num_failed} of them failures" if num_failed else ""
        _note(f"left out {plural(num_left_out, 'record')} of cells run again{failures}")
    num_older = sum(code_of(record) != newest for record in winners)
    if num_older:
        _note(f"{plural(num_older, 'cell')} ran with older code than {newest:.8}")


def _lines_of(path: Path, *, is_finished: bool) -> Iterator[tuple[int, Record]]:
    """Yield the number of each line and its record.

    The `memory_breakdown` of a record is a `Breakdown`, or None. What other processes
    on the GPU have changed is left out (`contaminated`).

    Args:
        path: the file.
        is_finished: whether every line must be complete. A run that was killed leaves a
            part of its last line, which is otherwise ignored, with a note.
    """
    unknown: set[str] = set()
    shared: breakdown.Shared = {}
    num_untimed = 0
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig")
            record = json.loads(
                text,
                parse_constant=_refuse_constant,
                object_pairs_hook=_refuse_duplicates,
            )
        except _NotFinite as error:
            raise RecordError(f"{where}: {error} is not a number in JSON") from error
        except _Duplicate as error:
            raise RecordError(
                f"{where}: {quoted(str(error))} is in one object twice; keep one"
            ) from error
        except (ValueError, RecursionError) as error:
            # Every complete line ends in a newline, so text after the last one was
            # being written when its writer was killed.
            if line.endswith((b"\n", b"\r")):
                raise RecordError(f"{where}: not JSON ({error})") from error
            if is_finished:
                raise RecordError(
                    f"{where}: the last line is not whole ({error}); restore the file"
                ) from error
            _note(f"{where}: torn by a killed run, left out")
            break
        unknown |= validate(record, where)
        if record.get("memory_breakdown") is not None:
            found = breakdown.read(record["memory_breakdown"], where, shared)
            record["memory_breakdown"] = found
        num_untimed += leave_out_shared(record)
        yield number, record
    if num_untimed:
        _note(
            f"{path}: {plural(num_untimed, 'record')} of cells that shared their GPU, "
            "whose times are left out"
        )
    if unknown:
        names = [printable(name, SHORT_LENGTH) for name in sorted(unknown)]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        _note(
            f"{path}: fields this report does not know: {', '.join(names[:10])}{more}"
        )


class _NotFinite(Exception):
    """Raised for `NaN` or `Infinity`, which Python reads and JSON does not have."""


class _Duplicate(Exception):
    """Raised for a name that an object has twice, of which Python keeps the last."""


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Duplicate(next(name for name in names if names.count(name) > 1))
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise _NotFinite(name)


def _note(text: str) -> None:
    # If stderr cannot be written, the records are still valid.
    with contextlib.suppress(OSError):
        print(f"note: {printable(text, NOTE_LENGTH)}", file=sys.stderr)
