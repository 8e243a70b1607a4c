"""What the fixtures of this folder give to a test."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Record = dict[str, Any]
MakeRecord = Callable[..., Record]
Write = Callable[..., Path]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Draw = Callable[[str], Figure]


def equal_memory(make: MakeRecord) -> list[Record]:
    """A method of MEFT, and others that score more or less at more or equal memory."""
    peaks = {
        "full": (400, 0.9),
        "lora": (300, 0.8),
        "meft1-exact": (100, 0.71),
        "lora-checkpointing": (104, 0.7),  # within the margin
        "lora-checkpointing-offload": (106, 0.75),
        "head": (50, 0.4),
    }
    return [
        make(
            method=method,
            seed=seed,
            score=score + way * seed / 10,
            peak_allocated_bytes=size * 2**20,
        )
        for method, (size, score) in peaks.items()
        for seed, way in ((0, 0), (1, 1 if method == "meft1-exact" else -1), (2, 0))
    ]
