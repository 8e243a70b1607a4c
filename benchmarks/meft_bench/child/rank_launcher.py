"""The child of a cell of several ranks: starts them, and takes the outcome of one.

    python -P -m meft_bench.child.rank_launcher --ranks N --worker MODULE
        --request JSON --out PATH --parent PID

The ranks are started and watched by torchrun: when one fails, it ends the others. Each
leaves its outcome in the folder `PATH.ranks`. That of rank 0 becomes the outcome of the
cell if all ranks end well; otherwise that of the rank that failed first, as those that
fail after it fail because of it. When the first has left none, this process ends as it
did: by the same signal, or with the same exit status.

Each rank ends with this process (`meft_bench.child.watchdog`), and this process with
its parent.
"""

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import uuid
from pathlib import Path
from typing import Any, NoReturn

from meft_bench.child.watchdog import die_with_parent
from meft_bench.shared import outcome
from meft_bench.shared.record import Status

_HERE = "127.0.0.1"


def main() -> None:
    """Start the ranks of the command line, and end as they do."""
    parser = argparse.ArgumentParser(description="Starts the ranks of a cell.")
    parser.add_argument("--ranks", required=True, type=int)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--request", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--parent", required=True, type=int)
    given = parser.parse_args()
    die_with_parent(given.parent)
    folder = _folder(given.out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [
        *("-P", "-m", given.worker, "--request", given.request),
        *("--out", str(given.out), "--parent", str(os.getpid())),
    ]
    exit_codes = _run(command, given.ranks, folder)
    failed = _first_to_fail(folder, exit_codes)
    last = _place(folder, failed or 0)
    if last.exists():
        _hand_over(last, failed, given.ranks, given.out)
    shutil.rmtree(folder, ignore_errors=True)
    if failed is not None and not given.out.exists():
        _end_as(failed, given.ranks, exit_codes[failed])


def _end_as(rank: int, num_ranks: int, exit_code: int) -> NoReturn:
    """End this process as a rank ended that left no outcome."""
    if exit_code < 0:
        print(
            f"rank {rank} of {num_ranks} was ended by signal {-exit_code}", flush=True
        )
        if -exit_code != signal.SIGKILL:
            signal.signal(-exit_code, signal.SIG_DFL)
        os.kill(os.getpid(), -exit_code)
    sys.exit(exit_code)


def _run(command: list[str], num_ranks: int, folder: Path) -> dict[int, int]:
    """Run a command of Python as so many ranks, and return how those that failed ended.

    Args:
        command: arguments of the interpreter.
        num_ranks: the number of processes.
        folder: where torchrun may write.

    Returns:
        Exit statuses by rank, below 0 for a signal.
    """
    # Imported here: they bring torch.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The last line of the log is the reason of a rank that left no outcome.
    logging.disable()
    if sys.platform == "linux":
        # Not by the name of the machine, which need not have an address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        # A port that is free when it is opened, as with `torchrun --standalone`.
        rdzv_backend="c10d",
        rdzv_endpoint=f"{_HERE}:0",
        rdzv_configs={"is_host": True},
        local_addr=_HERE,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


def _first_to_fail(folder: Path, exit_codes: dict[int, int]) -> int | None:
    """Return the rank that failed before the others; None if all ended well."""
    if not exit_codes:
        return None
    mute = [rank for rank in sorted(exit_codes) if not _place(folder, rank).exists()]
    # torchrun ends the others by SIGTERM.
    first = [rank for rank in mute if exit_codes[rank] != -signal.SIGTERM]
    if first:
        return first[0]
    left = [place for place in folder.glob("*.json") if _status(place) != Status.OK]
    if not left:
        return min(exit_codes)
    return int(min(left, key=lambda place: place.stat().st_mtime_ns).stem)


def _hand_over(place: Path, failed: int | None, num_ranks: int, out: Path) -> None:
    """Leave the outcome of a rank as that of the cell, and say which one failed."""
    answer = json.loads(place.read_bytes())
    if answer["status"] in (Status.OOM, Status.ERROR):
        answer["message"] = f"rank {failed} of {num_ranks}: {answer['message']}"
    outcome.leave(out, answer)


def leave(out: Path, answer: dict[str, object]) -> NoReturn:
    """Leave the outcome of this rank, and end the process.

    Not by returning: threads of gloo may hold tensors while the interpreter is torn
    down, which aborts it.

    Args:
        out: path of the outcome of the cell.
        answer: the outcome of this rank.
    """
    from torch import distributed

    outcome.leave(_place(_folder(out), int(os.environ["RANK"])), answer)
    is_ok = answer["status"] == Status.OK
    if is_ok:
        distributed.barrier()  # one that ends closes connections that others read
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if is_ok else 1)


def _folder(out: Path) -> Path:
    return out.with_suffix(".ranks")


def _place(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


def _status(place: Path) -> Any:
    return json.loads(place.read_bytes())["status"]


if __name__ == "__main__":
    main()
