"""The headline: one workload, every method, what a step takes on a real GPU.

The workload is the one on which full fine-tuning takes most memory, of those on which
every method of `METHODS` has run.
"""

from typing import Any

import pandas as pd

from meft_reports.labels import describe, fields_to_show
from meft_reports.summary import (
    PROVENANCE,
    WORKLOAD,
    on_random_input,
    prepare,
    split,
)

METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "adapters": "adapters",
    "checkpointing": "full, gradient checkpointing",
    "adapters-checkpointing": "adapters, gradient checkpointing",
    "meft1": "MEFT1, the paper's arithmetic",
    "meft1-exact": "MEFT1, exact",
}
"""The methods in order, each with its name for readers."""

NEEDS = (
    "one workload of the task synthetic or synthetic-lm with ok cells on the device "
    "cuda that measured their peak, without a `reference`, of all of these methods: "
    f"{', '.join(METHODS)}"
)
"""What the records must hold for there to be a headline."""

Cells = dict[str, "pd.Series[Any]"]
"""One cell of each method."""


def find(frame: pd.DataFrame) -> tuple[str, Cells] | None:
    """Return the workload in words and its cells; None if no workload has all methods.

    Args:
        frame: the frame of `meft_reports.frame`.
    """
    rows = prepare(frame)
    rows = rows[on_random_input(rows) & (rows["reference"] == "")]
    rows = rows[(rows["device"] == "cuda") & (rows["status"] == "ok")]
    rows = rows[rows["peak_activation_bytes"].notna()]
    shown = fields_to_show(rows, always=("backbone", "dtype", "batch_size", "seq_len"))
    found = [
        (describe(part, shown), _by_method(part))
        for _, part in split(rows, [*WORKLOAD, *PROVENANCE])
        if METHODS.keys() <= set(part["method"])
    ]
    if not found:
        return None
    return max(found, key=lambda each: float(each[1]["full"]["peak_allocated_bytes"]))


def _by_method(part: pd.DataFrame) -> Cells:
    """The first cell of each method."""
    return {str(row["method"]): row for _, row in part.iloc[::-1].iterrows()}
