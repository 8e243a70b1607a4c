"""Run one cell in a new process; every way it can end becomes a record.

The child receives a request (`meft_bench.shared.request`) and then
  1. makes sure that it ends with this process, before any heavy import;
  2. sets `RLIMIT_DATA` to `memory_limit_bytes` of the options, unless it is None;
     what `RLIMIT_DATA` does not count, shared memory and the processes that the child
     starts, this process adds up, and kills them above the limit;
  3. runs the cell and writes its outcome file (`meft_bench.shared.outcome`).
Its output is a log, kept next to that file and never parsed.

The status is derived as follows:

    files of the user have changed                  error; no child is started
    an outcome was written                          the status in it
    no outcome, and the time is over                timeout
    no outcome, and above the memory limit          oom
    no outcome, and a signal ended the child        killed
    no outcome, and it exited; or a malformed one   error
    no outcome, as it could not be written          error; the child exits with 74

The child leads its own session: all processes it started are killed with it, and Ctrl-C
in a terminal reaches only the parent.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from meft_bench.parent.engines import child_process, logs
from meft_bench.parent.engines.child_process import LostError, Stopped
from meft_bench.parent.engines.host_memory import TooLargeError
from meft_bench.parent.own import current
from meft_bench.shared import methods, outcome, request
from meft_bench.shared.cell import Cell
from meft_bench.shared.measurement import Measurement
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.outcome import Outcome
from meft_bench.shared.own import (
    Own,
    aliases_of,
    located,
    rows_of,
    without_places,
)
from meft_bench.shared.record import Environment, Record, Status
from meft_bench.shared.registry import VIRTUAL
from meft_bench.shared.request import WORKER
from meft_bench.shared.units import format_bytes

StartChild = Callable[..., int | None]
"""A function with the arguments and the result of `child_process.run`."""
WORKSPACES = "CUBLAS_WORKSPACE_CONFIG"
"""The variable of the sizes of cuBLAS's workspaces."""
_MESSAGE_LENGTH = 500


def run(
    cell: Cell,
    *,
    sweep: str,
    environment: Environment,
    options: ChildOptions,
    timeout_seconds: float,
    folder: Path,
    stop: threading.Event,
    question: str | None = None,
    caveats: Sequence[str] = (),
    own: Mapping[str, Own] | None = None,
    worker_module: str = WORKER,
    start_child: StartChild = child_process.run,
    save_to: Path | None = None,
    gpu: str = "",
) -> Record:
    """Run a cell in a new process and return a record of how it ended.

    Args:
        cell: the cell to run.
        sweep: name of the sweep, for the record.
        environment: the environment; the fields reported by the child are merged into
            it.
        options: options of the child.
        timeout_seconds: time after which the child and its processes are killed.
        folder: existing directory for the child's log and outcome.
        stop: when set, the child is killed and `Stopped` is raised.
        question: the question that the sweep answers, for the record.
        caveats: what the sweep says that a reader must know, for the record.
        own: things of the user, by what cells hold.
        worker_module: module that runs as the child.
        start_child: runs a command to its end: `child_process.run` in a new
            interpreter, or the method of a `ForkServer`.
        save_to: folder that gets the trained model; None if nothing is kept of it.
        gpu: UUID of the GPU that the child sees; "" leaves it those of this process.

    Raises:
        Stopped: `stop` was set.
        OSError: the log cannot be written, or no child started. No ending of the child
            raises.
    """
    if stop.is_set():
        raise Stopped
    started_at = now()
    start = time.monotonic()
    log = log_path(folder, cell).resolve()  # code of the user may change the folder
    own = own or {}
    if changed := current.why_not(cell, own):
        log.write_text(changed, encoding="utf-8")
        ending = _failure(Status.ERROR, changed)
    else:
        ending = _run_child(
            _body(cell, own, _with_files(options, cell, log, environment, save_to)),
            log,
            ranks=cell.ranks,
            worker_module=worker_module,
            variables=child_environment(options, cell.device, gpu),
            timeout_seconds=timeout_seconds,
            stop=stop,
            start_child=start_child,
            memory_limit_bytes=options.memory_limit_bytes,
        )
    return Record(
        sweep=sweep,
        cell=cell,
        status=ending.status,
        message=without_places(ending.message, own)[:_MESSAGE_LENGTH],
        started_at=started_at,
        wall_seconds=time.monotonic() - start,
        measurement=ending.measurement,
        environment=dataclasses.replace(
            environment,
            **_in_words(ending.environment, cell, own),
            is_forked=start_child is not child_process.run,
        ),
        sweep_question=question,
        sweep_caveats="\n".join(caveats),
        log_tail=logs.tail(log),
        memory_breakdown=ending.memory_breakdown,
        aliases=aliases_of(cell, own) or None,
    )


def _body(cell: Cell, own: Mapping[str, Own], options: ChildOptions) -> dict[str, Any]:
    """Return the request for a cell."""
    return {
        "cell": located(cell, own).to_json(),
        "options": options.to_json(),
        "rows": rows_of(cell, own),
    }


def _run_child(
    body: dict[str, Any],
    log: Path,
    *,
    ranks: int,
    worker_module: str,
    variables: Mapping[str, str],
    timeout_seconds: float,
    stop: threading.Event,
    start_child: StartChild,
    memory_limit_bytes: int | None,
) -> Outcome:
    """Start the child of a request, wait for its end, and return what it came to.

    Args:
        body: the request.
        log: file that receives what the child prints; the outcome is next to it.
        ranks: number of processes that train together.
        worker_module: module that runs as the child.
        variables: environment variables of the child.
        timeout_seconds: time after which the child and its processes are killed.
        stop: when set, the child is killed and `Stopped` is raised.
        start_child: see `run`.
        memory_limit_bytes: host memory of the child and its processes; None for no
            limit.
    """
    out = log.with_suffix(".json")
    out.unlink(missing_ok=True)
    try:
        code = start_child(
            request.command(body, out, worker_module=worker_module, ranks=ranks),
            log=log,
            variables=variables,
            timeout_seconds=timeout_seconds,
            stop=stop,
            memory_limit_bytes=memory_limit_bytes,
        )
        ending = _with_limit(
            _ending(out, log, code, timeout_seconds), body, memory_limit_bytes
        )
    except TooLargeError:
        assert memory_limit_bytes is not None
        ending = _failure(
            Status.OOM,
            "its processes held more than the limit of host memory, "
            f"{format_bytes(memory_limit_bytes)}, and were killed",
        )
    except LostError:
        ending = _failure(
            Status.KILLED,
            "the process that this one was forked from was killed, by the kernel "
            "or by another cell; run the same command again, or with `--fresh`",
        )
    out.unlink(missing_ok=True)
    # Of ranks that were killed with the process that cleans up after them.
    shutil.rmtree(out.with_suffix(".ranks"), ignore_errors=True)
    return ending


def _with_limit(
    ending: Outcome, body: dict[str, Any], memory_limit_bytes: int | None
) -> Outcome:
    """Return an outcome that says which limit a cell of the host has met."""
    is_of_host = body["cell"]["device"] == "cpu"
    if ending.status != Status.OOM or memory_limit_bytes is None or not is_of_host:
        return ending
    limit = f"the limit of host memory is {format_bytes(memory_limit_bytes)}"
    return dataclasses.replace(ending, message=f"{ending.message}; {limit}")


def _in_words(
    found: dict[str, Any], cell: Cell, own: Mapping[str, Own]
) -> dict[str, Any]:
    """Return what a child reports, with the origin of weights that a cell trained."""
    one = own.get(cell.backbone)
    if one is None or not one.trained_by or not found.get("weights_sha256"):
        return found
    return found | {"weights_origin": f"trained by {one.trained_by}"}


def _with_files(
    options: ChildOptions,
    cell: Cell,
    log: Path,
    environment: Environment,
    save_to: Path | None,
) -> ChildOptions:
    """Return options with the file from which a killed cell goes on, and `save_to`.

    Functions of the user may have state that no file has, and each of several ranks has
    its own: their cells start again.
    """
    if save_to is not None:
        options = dataclasses.replace(options, save_to=str(save_to))
    if cell.method not in methods.TABLE or cell.ranks > 1:
        return options
    same = {
        "cell": cell.key,
        "code": environment.code_sha256,
        "versions": environment.versions,
        "num_threads": options.num_threads,
    }
    text = json.dumps(same, sort_keys=True)
    return dataclasses.replace(
        options,
        checkpoint=str(log.with_suffix(".checkpoint").resolve()),
        checkpoint_identity=hashlib.sha256(text.encode()).hexdigest(),
    )


def now() -> str:
    """Return the time in UTC, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def log_path(folder: Path, cell: Cell) -> Path:
    """Return the path of the log of a cell's child."""
    # Some file systems have no colons in names.
    return folder / f"{cell.method.replace(':', '-')}-{cell.key[:16]}.log"


def child_environment(
    options: ChildOptions, device: str, gpu: str = ""
) -> dict[str, str]:
    """Return the environment variables of a child.

    They are the parent's, and settings that make runs reproducible. A real GPU is
    hidden from cells of other devices: it cannot be combined with a virtual one, and is
    of no use to a CPU.

    Args:
        options: options of the child.
        device: the device of its cell.
        gpu: UUIDs of the GPUs that it sees, separated by commas; "" for those of this
            process.
    """
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.num_threads),
        "MKL_NUM_THREADS": str(options.num_threads),
        # Threads that busy-wait would use the cores of parallel cells.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        WORKSPACES: ":4096:8",
        # NVML's order of devices; CUDA's default order differs.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    if device == "cpu" or device.startswith(VIRTUAL):
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif gpu:
        variables["CUDA_VISIBLE_DEVICES"] = gpu
    if options.allow_download:
        variables.pop("HF_HUB_OFFLINE", None)
    else:
        variables["HF_HUB_OFFLINE"] = "1"
    return variables


def _ending(out: Path, log: Path, code: int | None, timeout_seconds: float) -> Outcome:
    """Return the outcome the child wrote or, without one, the outcome of its exit.

    A child that wrote its outcome has finished its work, however it ended afterwards.

    Args:
        out: the outcome file.
        log: the log of the child.
        code: exit status of the child; None after a timeout.
        timeout_seconds: the time limit, for the message.
    """
    try:
        return outcome.read(out)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        return _failure(Status.ERROR, f"the child's outcome is malformed: {error}")
    if code is None:
        return _failure(Status.TIMEOUT, f"still running after {timeout_seconds:g} s")
    if code < 0:
        of_rank = re.match(r"rank \d+ of \d+", logs.last_line(log) or "")
        prefix = f"{of_rank[0]}: " if of_rank else ""
        why = child_process.describe_signal(-code)
        return _failure(Status.KILLED, f"{prefix}{why}")
    last = logs.last_line(log) or f"exit status {code}, and an empty log"
    if code == outcome.EXIT_UNWRITTEN:
        free = format_bytes(shutil.disk_usage(out.parent).free)
        return _failure(
            Status.ERROR,
            f"the child could not write its outcome: {last}; {free} are free in "
            f"{out.parent}",
        )
    if code == 0:
        return _failure(Status.ERROR, f"exited without an outcome: {last}")
    return _failure(Status.ERROR, last)


def _failure(status: Status, message: str) -> Outcome:
    return Outcome(
        status=status,
        message=" ".join(message.split()),
        measurement=Measurement(),
        environment={},
    )
