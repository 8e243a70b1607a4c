"""What every fake child does first, and how it writes down its outcome.

The real worker keeps the same contract; see `meft_bench.parent.engines.isolate`.
"""

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

from meft_bench.child.watchdog import die_with_parent
from meft_bench.shared import request
from meft_bench.shared.cell import Cell


class Child:
    """The arguments of a child, and its pen."""

    def __init__(self) -> None:
        given = request.read()
        die_with_parent(given.parent_pid)
        self.cell = Cell.from_json(given.body["cell"])
        self.options = given.body["options"]
        self.out = given.out
        limit = self.options["memory_limit_bytes"]
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        self._keep_journal()

    def _keep_journal(self) -> None:
        """Tell a test, through a file it named, who ran which cell."""
        journal = os.environ.get("FAKE_JOURNAL")
        if journal:
            line = json.dumps([os.getpid(), self.cell.id]) + "\n"
            with Path(journal).open("a") as file:
                file.write(line)

    def write(self, status: str = "ok", message: str = "", **environment: Any) -> None:
        """Write the outcome to another file, then rename it."""
        draft = self.out.with_suffix(".part")
        draft.write_text(json.dumps(self.outcome(status, message, **environment)))
        draft.rename(self.out)

    def outcome(self, status: str, message: str, **environment: Any) -> dict[str, Any]:
        """An outcome, as a JSON object."""
        return {
            "status": status,
            "message": message,
            "measurement": {"saved_bytes": 2**20, "step_seconds": 1, "loss_curve": []},
            "environment": environment,
            "memory_breakdown": None,
        }


def sleep_forever() -> None:
    """Longer than any test waits."""
    time.sleep(3600)
