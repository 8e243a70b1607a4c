"""What a child is told beside its cell: this machine's side of the work.

Options travel as JSON on the command line, from `isolate` to `worker`. They are not
part of the cell: the same cell may be run with others.
"""

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildOptions:
    """What the parent decides for every cell of a run."""

    data_dir: str | None = None
    """Directory that holds the tasks' data, if there is one."""
    allow_download: bool = False
    """Whether weights and data may be fetched from a hub."""
    num_threads: int = 1
    memory_limit_bytes: int | None = None
    """Bound on the child's data segment (`RLIMIT_DATA`), torch's libraries included;
    None sets no limit."""

    def to_json(self) -> str:
        """The options as the text of a JSON object."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ChildOptions":
        """The inverse of `to_json`."""
        return cls(**json.loads(text))
