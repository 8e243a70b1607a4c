"""Progress of a run: one line, rewritten in place on a terminal.

    12/90 ok 11, oom 1 |███▎      | 04:10 left, meft1/minilm-l6/b16-s64-fp32/...

Where the output is not a terminal, one line is printed for each cell that ended. The
time left is the mean over the cells that ended in this run, times the number of
remaining cells. A run continues if its output is closed, because its result is the
records.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

from meft_bench.parent import output
from meft_bench.parent.engines import isolate
from meft_bench.shared.cell import Cell
from meft_bench.shared.record import Record, Status

_LINE = "{n_fmt}/{total_fmt} {desc} |{bar:10}| {remaining} left{postfix}"
_COLUMNS = 80


class Progress:
    """Print the progress of a run; a context manager."""

    def __init__(
        self, *, num_cells: int, num_done: int, logs: Path, stream: TextIO
    ) -> None:
        """Begin at `num_done` of `num_cells`.

        Args:
            num_cells: number of cells of the run.
            num_done: number of cells that are done before it.
            logs: folder of the logs, which are named in messages about failures.
            stream: where to print.
        """
        self._logs = logs
        self._statuses: Counter[Status] = Counter()
        self._stream = stream
        is_terminal = stream.isatty()
        # Some containers' terminals have no width; tqdm would print nothing on them.
        lost = is_terminal and os.get_terminal_size(stream.fileno()).columns == 0
        width = _COLUMNS if lost else None
        self._bar = tqdm(
            total=num_cells,
            initial=num_done,
            bar_format=_LINE,
            dynamic_ncols=width is None,
            ncols=width,
            smoothing=0,  # the mean over the run: similar cells follow each other
            file=stream,
            disable=not is_terminal,
        )

    def started(self, cell: Cell) -> None:
        """Show that a cell begins; may be called from any thread."""
        with self._unread():
            self._bar.set_postfix_str(cell.id)

    def ended(self, record: Record) -> None:
        """Show that a cell ended and is recorded."""
        self._statuses[record.status] += 1
        with self._unread():
            self._show(record)

    def tell(self, line: str) -> None:
        """Print a line above the bar."""
        with self._unread():
            self._bar.write(line, file=self._stream)
            self._stream.flush()

    def _show(self, record: Record) -> None:
        if self._bar.disable:
            self._bar.n += 1
            place = f"[{self._bar.n}/{self._bar.total}]"
            self.tell(f"{place} {_line(record)}")
        if record.status == Status.OK and record.message:
            self.tell(f"note: {record.cell.id}: {record.message}")
        if record.status not in (Status.OK, Status.SKIPPED):
            log = isolate.log_path(self._logs, record.cell)
            self.tell(f"{record.status}: {record.cell.id}: {record.message} ({log})")
        self._bar.set_description_str(count(self._statuses.elements()), refresh=False)
        self._bar.update()

    @contextlib.contextmanager
    def _unread(self) -> Iterator[None]:
        """Stop all output as soon as it cannot be written."""
        try:
            yield
        except OSError:  # the pipe or the terminal is closed, or the disk is full
            self._bar.disable = True
            output.forget(self._stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._unread():
            self._bar.close()


def count(statuses: Iterable[Status]) -> str:
    """Return the counts of each status, in the order of `Status`: `ok 11, oom 1`."""
    counts = Counter(statuses)
    return ", ".join(f"{name} {counts[name]}" for name in Status if counts[name])


def _line(record: Record) -> str:
    return f"{record.status} {record.wall_seconds:.1f} s {record.cell.id}"
