"""The child: one fresh process that runs one cell and writes down what it saw.

    python -m meft_bench.worker --cell JSON --options JSON --out PATH --parent PID

The result goes to PATH by write-then-rename, whole or not at all; stdout and stderr are
only a log. Endings that the child survives are statuses: `ok`, `oom`, `skipped` (data,
weights or device are not at hand) and `error`. What it does not survive is for the
parent to see.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import sys
import traceback
from pathlib import Path

from meft_bench import outcome
from meft_bench.cell import Cell
from meft_bench.leash import die_with_parent
from meft_bench.options import ChildOptions
from meft_bench.out_of_memory import is_out_of_memory
from meft_bench.record import Status
from meft_bench.registry import VIRTUAL
from meft_bench.sighting import Sighting, remark
from meft_bench.source import MissingError, Source


def main() -> None:
    """Run the cell of the command line."""
    parser = argparse.ArgumentParser(description="Run one cell; for meft-bench itself.")
    parser.add_argument("--cell", required=True)
    parser.add_argument("--options", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--parent", required=True, type=int)
    args = parser.parse_args()
    die_with_parent(args.parent)
    cell = Cell.from_json(json.loads(args.cell))
    options = ChildOptions.from_json(args.options)
    if options.memory_limit_bytes is not None:
        limit = options.memory_limit_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if not options.allow_download:
        # Set before the libraries are imported, which is when they look.
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    outcome.leave(args.out, run(cell, options))


def run(cell: Cell, options: ChildOptions) -> dict[str, object]:
    """Run `cell` and return its result as a JSON object, however it ends."""
    sighting = Sighting()
    try:
        # Imported here: under a memory limit, torch itself may not fit.
        import torch

        if cell.device.startswith(VIRTUAL):
            from meft_bench.virtual.predict import predict as look
        else:
            from meft_bench.measure import measure as look

        torch.set_num_threads(options.num_threads)
        source = Source(
            data_dir=Path(options.data_dir) if options.data_dir else None,
            allow_download=options.allow_download,
        )
        look(cell, source, sighting)
        status, message = Status.OK, remark(sighting.measurement.loss_curve)
    except MissingError as error:
        status, message = Status.SKIPPED, str(error)
    except Exception as error:
        with contextlib.suppress(OSError):  # there may be no room for a log
            traceback.print_exc(file=sys.stderr)
        status = Status.OOM if is_out_of_memory(error) else Status.ERROR
        message = one_line(error)
    return {
        "status": status,
        "message": message,
        "measurement": dataclasses.asdict(sighting.measurement),
        "environment": sighting.environment,
    }


def one_line(error: BaseException) -> str:
    """`Type: message`, the first line of it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
