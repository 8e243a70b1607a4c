"""The child: one new process that runs one cell, predicts several, or runs a check.

A request (`meft_bench.shared.request`) holds one of these; the answer is written
atomically, and stdout and stderr are only a log. Failures of a cell after which the
child still runs are statuses: `ok`, `oom`, `skipped` (data, weights or device are not
available) and `error`. Other failures are detected by the parent.
"""

import contextlib
import gc
import os
import resource
import sys
import traceback
from collections.abc import Callable
from functools import partial as partial_of
from pathlib import Path
from typing import Any

from meft_bench.child import rank_launcher
from meft_bench.child.measuring.partial_result import PartialResult, remarks
from meft_bench.child.training.out_of_memory import is_out_of_memory
from meft_bench.child.watchdog import die_with_parent
from meft_bench.shared import outcome, request
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Status
from meft_bench.shared.registry import VIRTUAL
from meft_bench.shared.source import MissingError, Source


def main() -> None:
    """Process the request on the command line."""
    given = request.read()
    die_with_parent(given.parent_pid)
    options = ChildOptions(**given.body["options"])
    if options.memory_limit_bytes is not None:
        limit = options.memory_limit_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if not options.allow_download:
        # Set before the libraries are imported, because they read it on import.
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # Imports leave little garbage. To look for it takes a quarter of their time, and to
    # look through all that they made once more, when Python ends, a second.
    gc.disable()
    if "cell" in given.body:
        cell = Cell.from_json(given.body["cell"])
        rows = given.body.get("rows")
        answer = run(cell, options, rows, when_imported=_collect_from_now_on)
        if cell.ranks > 1:
            rank_launcher.leave(given.out, answer)
    elif "check" in given.body:
        from meft_bench.virtual.validation import checks

        _collect_from_now_on()
        answer = checks.run(given.body["check"], options)
    else:
        from meft_bench.virtual.prediction.planner import plan_all

        _collect_from_now_on()
        answer = plan_all(given.body["plan"], options)
    outcome.leave(given.out, answer)


def _collect_from_now_on() -> None:
    """Collect garbage again, but never look at what exists now."""
    gc.freeze()
    gc.enable()


def run(
    cell: Cell,
    options: ChildOptions,
    rows: dict[str, Any] | None = None,
    when_imported: Callable[[], object] = lambda: None,
) -> dict[str, object]:
    """Run `cell` and return its result as a JSON object, even if it fails.

    Args:
        cell: the cell to run.
        options: options of the child.
        rows: where the rows of a task of the user are.
        when_imported: called once the libraries of the cell are imported.
    """
    partial = PartialResult()
    try:
        # Imported here: under a memory limit, torch itself may not fit.
        import torch

        look = _look(cell, options)
        when_imported()
        torch.set_num_threads(options.num_threads)
        source = Source(
            data_dir=Path(options.data_dir) if options.data_dir else None,
            allow_download=options.allow_download,
            rows=rows,
        )
        look(cell, source, partial)
        _forget_checkpoint(options)
        status, message = Status.OK, remarks(partial.measurement)
    except MissingError as error:
        status, message = Status.SKIPPED, str(error)
    except Exception as error:
        _forget_checkpoint(options)  # what failed by itself would fail again
        with contextlib.suppress(OSError):  # there may be no room for a log
            traceback.print_exc(file=sys.stderr)
        status = Status.OOM if is_out_of_memory(error) else Status.ERROR
        message = one_line(error)
    return {
        "status": status,
        "message": message,
        "measurement": partial.measurement.to_json(),
        "environment": partial.environment,
        "memory_breakdown": partial.memory_breakdown,
    }


def _look(
    cell: Cell, options: ChildOptions
) -> Callable[[Cell, Source, PartialResult], None]:
    """Return the function that predicts or measures a cell."""
    if cell.device.startswith(VIRTUAL):
        from meft_bench.virtual.prediction.predict import predict

        return predict
    from meft_bench.child.measuring.measure import measure
    from meft_bench.child.training.checkpoint import Checkpoint

    save_to = None if options.save_to is None else Path(options.save_to)
    if options.checkpoint is None:
        return partial_of(measure, save_to=save_to)
    checkpoint = Checkpoint(
        Path(options.checkpoint),
        options.checkpoint_identity,
        options.checkpoint_seconds,
    )
    return partial_of(measure, checkpoint=checkpoint, save_to=save_to)


def _forget_checkpoint(options: ChildOptions) -> None:
    """Remove the state of a training that has ended by itself."""
    if options.checkpoint is not None:
        with contextlib.suppress(OSError):
            Path(options.checkpoint).unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """Return `Type: message` with the first line of the message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
