"""Settings of a child process that are not part of its cell.

They are part of a request (`meft_bench.shared.request`). The same cell may be run with
other options.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildOptions:
    """Options that the parent sets for every cell of a run."""

    data_dir: str | None = None
    """Directory that contains the tasks' data, if there is one."""
    allow_download: bool = False
    """Whether weights and data may be downloaded from a hub."""
    num_threads: int = 1
    checkpoint: str | None = None
    """File of the state of a training, from which the cell goes on; None for none."""
    checkpoint_identity: str = ""
    """What a state must agree in: the cell, the code, packages, number of threads."""
    checkpoint_seconds: float = 300.0
    """Time between two checkpoints."""
    save_to: str | None = None
    """Folder that gets the trained model, in transformers' layout; None for none."""
    memory_limit_bytes: int | None = None
    """Limit of host memory in bytes; None sets no limit.

    It is that of the child's data segment (`RLIMIT_DATA`), which includes torch's
    libraries, and of what all processes of the child hold together.
    """

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; `ChildOptions(**object)` is the inverse."""
        return dataclasses.asdict(self)
