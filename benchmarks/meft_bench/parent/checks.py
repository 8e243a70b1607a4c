"""The checks of a sweep: small programs run on a GPU and on its virtual counterpart.

Each runs in its own child (`virtual/validation`); its report is appended as one line to
a file next to the records (`runs/gpu-check.checks.jsonl`):

    {"check": "card", "device": "cuda", "status": "ok", "message": "", "seconds": 3.1,
     "device_name": ..., "started_at": ..., "figures": [{"case", "quantity", "value"}],
     "environment": {...}}
"""

import dataclasses
import json
import os
import re
import signal
import statistics
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from meft_bench.parent.engines import child_process, isolate
from meft_bench.parent.engines.host_memory import TooLargeError
from meft_bench.shared import published, request
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Environment, Status
from meft_bench.shared.registry import VIRTUAL
from meft_bench.shared.request import WORKER

_KEYS = {"check", "device", "device_name", "status", "figures", "environment"}


def path_next_to(records: Path) -> Path:
    """Return the path of the file of checks that belongs to a records file."""
    return records.with_suffix(".checks.jsonl")


def named(names: Sequence[str], device: str) -> list[tuple[str, str]]:
    """Return each check of a sweep with the device it runs on.

    Published numbers become a check for each run, on the virtual GPU that it names.

    Args:
        names: names of `registry.CHECKS`.
        device: `cuda` or a virtual GPU.
    """
    found = []
    for name in names:
        found += published.runs() if name == published.CHECK else [(name, device)]
    return found


def is_done(path: Path, name: str, device: str, environment: Environment) -> bool:
    """Return whether the file has an ok check of the same code and machine.

    Args:
        path: the file of checks.
        name: one of `registry.CHECKS`, or of `named`.
        device: `cuda` or a virtual GPU.
        environment: the current environment.
    """
    wanted = {
        "check": name,
        "device": device,
        "status": Status.OK,
        "code_sha256": environment.code_sha256,
        "machine": environment.machine,
        "versions": environment.versions,
    }
    for line in _lines(path):
        found = {**line["environment"], **line}
        if all(found[key] == value for key, value in wanted.items()):
            return True
    return False


def run(
    name: str,
    device: str,
    *,
    path: Path,
    logs: Path,
    environment: Environment,
    options: ChildOptions,
    timeout_seconds: float,
    ends_run: bool,
    stop: threading.Event,
    start_child: isolate.StartChild = child_process.run,
) -> dict[str, Any] | None:
    """Run one check, and append its report to `path`.

    Args:
        name: one of `registry.CHECKS`, or of `named`.
        device: `cuda` or a virtual GPU.
        path: the file of checks.
        logs: existing folder for the child's output.
        environment: the environment of the run.
        options: options of the child.
        timeout_seconds: time after which the child is killed.
        ends_run: whether that is the end of the whole run, which is no fault of the
            check: nothing is recorded then.
        stop: when set, the child is killed and `Stopped` is raised.
        start_child: runs a command to its end, as `child_process.run` does.

    Returns:
        The line, as a JSON object; None where nothing is recorded.

    Raises:
        Stopped: `stop` was set.
    """
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    answer = _run_one(name, device, logs, options, timeout_seconds, stop, start_child)
    if answer["status"] == Status.TIMEOUT and ends_run:
        return None
    line = {
        "check": name,
        "device": device,
        "started_at": started_at,
        **answer,
        "environment": dataclasses.asdict(environment),
    }
    with path.open("a+b") as file:
        # A line that a killed run has left half written ends here.
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(("\n" * torn + json.dumps(line) + "\n").encode())
    return line


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of checks; none if there is no file."""
    try:
        texts = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.keys() >= _KEYS:
            yield line


def compare(path: Path) -> list[str]:
    """Return lines that compare predicted figures with measured ones.

    Figures of a check are compared with those of the virtual GPU of the same name. The
    newest figures of checks that ended well are used; there are no lines before a check
    has run on both.
    """
    newest: dict[tuple[str, str, bool], dict[tuple[str, str], Any]] = {}
    for line in _lines(path):
        if line["status"] != Status.OK:
            continue
        is_virtual = line["device"].startswith(VIRTUAL)
        newest[line["check"], line["device_name"], is_virtual] = {
            (figure["case"], figure["quantity"]): figure["value"]
            for figure in line["figures"]
        }
    lines = []
    for (check, card, is_virtual), predicted in newest.items():
        measured = newest.get((check, card, False), {})
        if is_virtual and measured:
            lines += [f"{check}: {text}" for text in _differences(measured, predicted)]
    return lines


def _differences(
    measured: dict[tuple[str, str], Any], predicted: dict[tuple[str, str], Any]
) -> Iterator[str]:
    """Yield a line for each quantity that was both measured and predicted."""
    both = [key for key in measured if key in predicted]
    for quantity in dict.fromkeys(quantity for _, quantity in both):
        keys = [key for key in both if key[1] == quantity]
        pairs = [(measured[key], predicted[key]) for key in keys]
        num_equal = sum(one == other for one, other in pairs)
        text = f"{quantity}: {num_equal} of {len(pairs)} as predicted"
        errors = {
            key[0]: other / one - 1
            for key, (one, other) in zip(keys, pairs, strict=True)
            if isinstance(one, int | float) and isinstance(other, int | float) and one
        }
        if errors:
            worst = max(errors, key=lambda case: abs(errors[case]))
            typical = statistics.median(map(abs, errors.values()))
            text += (
                f", median error {typical:.2%}, worst {errors[worst]:+.2%} ({worst})"
            )
        yield text


def _run_one(
    name: str,
    device: str,
    logs: Path,
    options: ChildOptions,
    timeout_seconds: float,
    stop: threading.Event,
    start_child: isolate.StartChild,
) -> dict[str, Any]:
    # A device may be a path, and a check has the name of a run.
    label = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{name}-{device}")
    out = (logs / f"check-{label}.json").resolve()
    out.unlink(missing_ok=True)
    log = out.with_suffix(".log")
    body = {"check": {"name": name, "device": device}, "options": options.to_json()}
    variables = isolate.child_environment(options, device)
    if name.startswith(f"{published.CHECK}/"):  # was measured with the default ones
        del variables[isolate.WORKSPACES]
    code: int | None
    is_too_large = False
    try:
        code = start_child(
            request.command(body, out, worker_module=WORKER),
            log=log,
            variables=variables,
            timeout_seconds=timeout_seconds,
            stop=stop,
            memory_limit_bytes=options.memory_limit_bytes,
        )
    except child_process.LostError:
        code = -signal.SIGKILL
    except TooLargeError:
        code, is_too_large = -signal.SIGKILL, True
    status = Status.ERROR
    if is_too_large:
        status = Status.OOM
        message = "its processes held more than the limit of host memory"
    elif code is None:
        status = Status.TIMEOUT
        message = f"still running after {timeout_seconds:g} s"
    elif code < 0:
        message = f"{child_process.describe_signal(-code)}; see {log}"
    else:
        message = f"ended with {code}; see {log}"
    if not out.is_file():
        return {
            "status": status,
            "message": message,
            "figures": [],
            "seconds": None,
            "device_name": None,
        }
    answer: dict[str, Any] = json.loads(out.read_text())
    out.unlink()
    return answer
