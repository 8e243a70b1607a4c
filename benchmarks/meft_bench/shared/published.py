"""Memory that others measured on real GPUs and published: the rows of a file.

`benchmarks/published-gpu-memory.csv` has one number per row, with its source, settings
and what is assumed. Rows of the same source, program and GPU belong to one run.
`benchmarks/published-estimates.csv` has what other estimators say of some of them.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from meft_bench.shared.registry import VIRTUAL
from meft_bench.shared.tables import path_in_use

FILE = "published-gpu-memory.csv"
ESTIMATES = "published-estimates.csv"
CHECK = "published"
"""The name by which a sweep lists the predictions of all rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One published number.

    Attributes:
        source: who measured it.
        url: where it is published.
        gpu: name of the GPU, as `virtual_gpu` takes it.
        program: what was run.
        size: the size that its benchmark varies, or the tokens of a row.
        metric: name of the function of `torch.cuda` that measured it, or `nvidia-smi`.
        num_bytes: the number.
        settings: what else describes the run.
        note: how it was measured, and what is assumed.
    """

    source: str
    url: str
    gpu: str
    program: str
    size: int
    metric: str
    num_bytes: int
    settings: dict[str, Any]
    note: str

    @property
    def run(self) -> str:
        """Name of the check that predicts it, with all other numbers of the run."""
        return f"{CHECK}/{self.source}/{self.program}"

    @property
    def device(self) -> str:
        """The virtual GPU of the check."""
        return f"{VIRTUAL}{self.gpu}"


def rows() -> list[Published]:
    """Return all rows of the file, in order."""
    with path_in_use(FILE).open(encoding="utf-8", newline="") as file:
        return [
            Published(
                **row  # type: ignore[arg-type]
                | {name: int(row[name]) for name in ("size", "num_bytes")}
                | {"settings": json.loads(row["settings"] or "{}")}
            )
            for row in csv.DictReader(file)
        ]


def runs() -> list[tuple[str, str]]:
    """Return the check and the device of each run, once, in the order of the file."""
    return list(dict.fromkeys((row.run, row.device) for row in rows()))


def rows_of(check: str, device: str) -> list[Published]:
    """Return the rows of one of `runs`, in order."""
    return [row for row in rows() if (row.run, row.device) == (check, device)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What another estimator says of a published number.

    Attributes:
        tool: name and version of the estimator.
        num_bytes: its answer; None if it cannot describe the run.
        how: its settings.
        note: what it leaves out, or why there is no answer.
    """

    tool: str
    num_bytes: int | None
    how: str
    note: str


def estimates() -> Iterator[tuple[tuple[str, str, str, int, str], Estimate]]:
    """Yield estimates with the source, program, GPU, size and metric of their row."""
    with path_in_use(ESTIMATES).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            size = int(row["size"])
            key = (row["source"], row["program"], row["gpu"], size, row["metric"])
            number = row["num_bytes"]
            yield (
                key,
                Estimate(
                    tool=row["tool"],
                    num_bytes=int(number) if number else None,
                    how=row["how"],
                    note=row["note"],
                ),
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFigure:
    """A published number and its prediction, as the report of a check has it.

    Attributes:
        case: the program, and the size that was run.
        quantity: what was measured, in bytes.
        value: the prediction.
        measured: the published number.
        source: who measured it.
        url: where it is published.
        note: how it was measured, and what is assumed.
        is_calibration: whether an assumption was chosen to meet this number.
        estimates: what other estimators say, in bytes, by their name.
    """

    case: str
    quantity: str
    value: int
    measured: int
    source: str
    url: str
    note: str
    is_calibration: bool
    estimates: dict[str, int | None]

    @property
    def error(self) -> float:
        """The relative error of the prediction."""
        return self.value / self.measured - 1
