"""What a paper reports of the backbones and methods of a run, for a table of its own.

The numbers are those of `papers.csv`, each with its place in the paper.
They came about on other GPUs, with other batches, rows and weights, so no number of the
page is computed from them; the table says what was different.
"""

import csv
import functools
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

from meft_reports.labels import is_quantised
from meft_reports.page.settings import Setting

MOST_CONDITIONS = 2


class Reported(NamedTuple):
    """One number of a paper, with what it was measured under, there and here."""

    source: str
    backbone: str
    method: str
    task: str
    metric: str
    value: str
    there: str
    here: str


def reported(settings: Sequence[Setting]) -> list[Reported]:
    """Return what papers report of the same backbone and method, in their order."""
    conditions: dict[tuple[str, str], list[str]] = {}
    for setting in settings:
        fields = setting.workload.fields
        key = fields["backbone"].removeprefix("random:"), setting.method
        its = conditions.setdefault(key, [])
        if (text := _conditions(setting)) not in its:
            its.append(text)
    return [
        Reported(
            source=f"{row['source']}, {row['table']}",
            backbone=row["backbone"],
            method=row["method"],
            task=row["task"] or "any",
            metric=row["metric"],
            value=f"{row['value']} ({row['unit']})",
            there=row["note"],
            here=_in_words(conditions[row["backbone"], row["method"]]),
        )
        for row in _rows()
        if (row["backbone"], row["method"]) in conditions
    ]


@functools.cache
def _rows() -> list[dict[str, str]]:
    text = resources.files("meft_reports").joinpath("papers.csv").read_text("utf-8")
    return list(csv.DictReader(text.splitlines()))


def _conditions(setting: Setting) -> str:
    fields = setting.workload.fields
    dtype = fields["weights_dtype"]
    quantised = f"{dtype} weights" if is_quantised(dtype) else ""
    weights = "random weights" if fields["backbone"].startswith("random:") else ""
    parts = [
        fields["task"],
        f"batch {fields['batch_size']}",
        f"{fields['seq_len']} tokens",
        fields["dtype"],
        quantised,
        fields["device"],
        weights,
    ]
    return ", ".join(part for part in parts if part)


def _in_words(conditions: Sequence[str]) -> str:
    shown = "; ".join(conditions[:MOST_CONDITIONS])
    num_left_out = len(conditions) - MOST_CONDITIONS
    return f"{shown}; and {num_left_out} more" if num_left_out > 0 else shown
