"""The checks of a sweep: small programs run on a GPU and on its virtual twin.

Each runs in a child of its own (`virtual/validation`); what it reports is appended as
one line to the file of checks beside the records:

    {"check": "card", "device": "cuda", "status": "ok", "message": "", "seconds": 3.1,
     "device_name": ..., "started_at": ..., "figures": [{"case", "quantity", "value"}],
     "environment": {...}}
"""

import dataclasses
import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from meft_bench.parent import isolate
from meft_bench.shared import request
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Environment, Status
from meft_bench.shared.request import WORKER


def path_beside(records: Path) -> Path:
    """The file of checks that belongs to a records file."""
    return records.with_suffix(".checks.jsonl")


def is_done(path: Path, name: str, device: str, environment: Environment) -> bool:
    """Whether a check is in the file with figures of the same code and machine."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return False
    wanted = {
        "check": name,
        "device": device,
        "status": Status.OK,
        "code_sha256": environment.code_sha256,
        "machine": environment.machine,
    }
    for text in lines:
        line = json.loads(text)
        if wanted == {**line, **line["environment"]} | wanted:
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
) -> dict[str, Any]:
    """Run one check, and append what it reports to `path`.

    Args:
        name: of `registry.CHECKS`.
        device: `cuda` or a virtual GPU.
        path: the file of checks.
        logs: existing folder for what the child prints.
        environment: where.
        options: of the child.
        timeout_seconds: after which it is killed.

    Returns:
        The line, as a JSON object.
    """
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    answer = _run_one(name, device, logs, options, timeout_seconds)
    line = {
        "check": name,
        "device": device,
        "started_at": started_at,
        **answer,
        "environment": dataclasses.asdict(environment),
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line


def _run_one(
    name: str, device: str, logs: Path, options: ChildOptions, timeout_seconds: float
) -> dict[str, Any]:
    out = (logs / f"check-{name}-{device}.json").resolve()
    out.unlink(missing_ok=True)
    log = out.with_suffix(".log")
    body = {"check": {"name": name, "device": device}, "options": options.to_json()}
    message = ""
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                request.command(body, out, worker_module=WORKER),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=isolate.child_environment(options, device),
                timeout=timeout_seconds,
                check=False,
            )
            message = f"ended with {done.returncode}; see {log}"
        except subprocess.TimeoutExpired:
            message = f"still running after {timeout_seconds:g} s"
    if not out.is_file():
        return {"status": "error", "message": message, "figures": [], "seconds": None}
    answer: dict[str, Any] = json.loads(out.read_text())
    out.unlink()
    return answer
