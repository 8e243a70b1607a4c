"""The request of a parent to a child process: JSON on the child's command line.

    python -P -m meft_bench.child.worker --request JSON --out PATH --parent PID

    {"cell": {...}, "options": {...}}               run a cell; PATH gets its outcome;
                                                    "rows" has those of its own task
    {"plan": {"cells": [...], ...}, "options": {...}}   predict; PATH gets the plans
    {"check": {"name": ..., "device": ...}, "options": {...}}   PATH gets its figures

PATH is written atomically (`meft_bench.shared.outcome`).
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "meft-bench: "
"""Begins the lines of a planner that its parent shows."""
WORKER = "meft_bench.child.worker"
"""The module that runs as the child."""
LAUNCHER = "meft_bench.child.rank_launcher"
"""The module that starts the ranks of a cell, each of which runs the worker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A child's command line.

    Attributes:
        body: the JSON object above.
        out: path of the answer.
        parent_pid: process that the child must not outlive.
    """

    body: dict[str, Any]
    out: Path
    parent_pid: int


def command(
    body: dict[str, Any], out: Path, *, worker_module: str, ranks: int = 1
) -> list[str]:
    """Return the command that starts a child of this process.

    Args:
        body: the request, as above.
        out: path of the answer.
        worker_module: module that runs as the child.
        ranks: number of processes that run it together; above 1, the child starts them.
    """
    several = ("--ranks", str(ranks), "--worker", worker_module)
    return [
        *(sys.executable, "-P", "-m", worker_module if ranks == 1 else LAUNCHER),
        *(several if ranks > 1 else ()),
        *("--request", json.dumps(body)),
        *("--out", str(out)),
        *("--parent", str(os.getpid())),
    ]


def read() -> Request:
    """Parse this process's own command line, which `command` made."""
    parser = argparse.ArgumentParser(description="A child process of meft-bench.")
    parser.add_argument("--request", required=True, type=json.loads)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--parent", required=True, type=int)
    given = parser.parse_args()
    return Request(body=given.request, out=given.out, parent_pid=given.parent)
