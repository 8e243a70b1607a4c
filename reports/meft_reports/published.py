"""Predictions of memory that others measured on real GPUs and published, as tables.

The numbers are in files of checks (`runs/published-gpus.checks.jsonl`), as
`meft-bench run published-gpus` writes them: a line for each run.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_reports.errors import RecordError
from meft_reports.files import read_whole
from meft_reports.format import (
    NOTHING,
    ShownNumber,
    format_bytes,
    format_count,
    format_share,
)
from meft_reports.tables.table import Heading, Table
from meft_reports.text import printable

NEEDS = "a file of checks with ok runs of published numbers"
"""What a file of checks must hold for there to be a table."""
VIEWS = {
    "memory_allocated": "allocated",
    "max_memory_allocated": "allocated",
    "memory_reserved": "reserved",
    "max_memory_reserved": "reserved",
}
"""What a function of `torch.cuda` counts; others are shown by their own name."""
MEASURED_BY = Heading("measured by", "Who measured and published the numbers.")
GPU = Heading("GPU", "Name of the GPU.")
METRIC = Heading("metric", "What was measured.")
NUMBERS = Heading("numbers", "How many published numbers.")
MEDIAN_ERROR = Heading(
    "median error", "Median of the relative errors without their sign."
)
SUMMARY_COLUMNS = (
    MEASURED_BY,
    GPU,
    METRIC,
    NUMBERS,
    MEDIAN_ERROR,
    Heading("mean error", "Mean of the relative errors with their sign."),
    Heading("90 % of errors below", "90th percentile without their sign."),
    Heading("worst error", "Relative error that is largest without its sign."),
    Heading("of", "Run with the worst error."),
)
ESTIMATOR_COLUMNS = (
    Heading("estimator", "Name of the estimator."),
    Heading("numbers", "How many published numbers it answers."),
    MEDIAN_ERROR,
    Heading("within 10 %", "How many of its answers have an error of at most 10 %."),
    Heading("lowest error", "Lowest relative error, with its sign."),
    Heading("highest error", "Highest relative error, with its sign."),
    Heading(
        "this suite, same numbers",
        "Median error of this suite over the numbers that the estimator answers.",
    ),
)
NUMBER_COLUMNS = (
    MEASURED_BY,
    Heading("run", "What was run."),
    GPU,
    METRIC,
    Heading("measured", "Bytes, as published."),
    Heading("predicted", "Bytes, as predicted."),
    Heading("error", "Relative error of the prediction."),
    Heading("assumed", "How it was measured, and what the prediction assumes."),
)
KINDS: dict[str, type | tuple[type, ...]] = {
    "case": str,
    "quantity": str,
    "value": int,
    "measured": int,
    "source": str,
    "note": str,
    "is_calibration": bool,
    "estimates": dict,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """One published number with its prediction.

    Attributes:
        source: who measured it.
        device: name of the GPU.
        case: what was run.
        quantity: what was measured: a function of `torch.cuda`, or `nvidia-smi`.
        measured: the published number of bytes.
        predicted: the prediction in bytes.
        note: how it was measured, and what is assumed.
        is_calibration: whether an assumption was chosen to meet this number.
        estimates: answers of other estimators in bytes, by their name; None for none.
    """

    source: str
    device: str
    case: str
    quantity: str
    measured: int
    predicted: int
    note: str
    is_calibration: bool
    estimates: Mapping[str, int | None]

    @property
    def error(self) -> float:
        """The relative error of the prediction."""
        return self.predicted / self.measured - 1


def read(paths: Iterable[Path]) -> list[Number]:
    """Return the published numbers of files of checks; the newest of each.

    Raises:
        RecordError: a file cannot be read, or has a line that is no check.
    """
    newest: dict[tuple[str, str, str, str], Number] = {}
    for path in paths:
        for number in _numbers(path):
            key = (number.source, number.device, number.case, number.quantity)
            newest[key] = number
    return list(newest.values())


def _numbers(path: Path) -> Iterator[Number]:
    content = read_whole(path)
    lines = content.splitlines()
    for index, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if line["status"] != "ok":
                continue
            figures = [f for f in line["figures"] if "measured" in f]
            for figure in figures:
                yield _number(figure, line["device_name"])
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            if index == len(lines) and not content.endswith(b"\n"):
                return  # torn by a killed run
            raise RecordError(f"{path}, line {index}: not a check") from error


def _number(figure: dict[str, Any], device: str) -> Number:
    for name, kind in KINDS.items():
        is_bool = isinstance(figure[name], bool)
        if not isinstance(figure[name], kind) or is_bool != (kind is bool):
            raise TypeError(name)
    if not isinstance(device, str):
        raise TypeError("device_name")
    if figure["measured"] <= 0:
        raise ValueError("measured")
    texts = {
        name: printable(figure[name]) for name in ("source", "case", "quantity", "note")
    }
    return Number(
        **texts,
        device=printable(device),
        measured=figure["measured"],
        predicted=figure["value"],
        is_calibration=figure["is_calibration"],
        estimates={
            printable(name): None if size is None else int(size)
            for name, size in figure["estimates"].items()
        },
    )


def tables(numbers: Sequence[Number]) -> list[Table]:
    """Return a summary, other estimators on the same numbers, and every number."""
    if not numbers:
        return []
    is_free = any(not number.is_calibration for number in numbers)
    found = [_summary(numbers)] if is_free else []
    found += _estimators(numbers)
    found.append(_every_number(numbers))
    return found


def _summary(numbers: Sequence[Number]) -> Table:
    free = [number for number in numbers if not number.is_calibration]
    rows = []
    for view, some in _grouped(free, lambda number: (_view(number),)).items():
        rows.append(("all", NOTHING, *view, *_errors(some)))
    groups = _grouped(free, lambda n: (n.source, n.device, n.quantity))
    rows += [(*key, *_errors(some)) for key, some in groups.items()]
    num_fitted = len(numbers) - len(free)
    return Table(
        title="Predictions of memory that others measured: summary",
        columns=SUMMARY_COLUMNS,
        rows=tuple(rows),
        num_text_columns=3,
        notes=(
            "Measured by others, not by us; an error above 0 is a prediction that is "
            f"too high. {format_count(num_fitted)} numbers to which an assumption was "
            "fitted are left out.",
        ),
    )


def _view(number: Number) -> str:
    return VIEWS.get(number.quantity, number.quantity)


def _errors(some: Sequence[Number]) -> tuple[str, ...]:
    errors = [number.error for number in some]
    sizes = sorted(map(abs, errors))
    worst = max(some, key=lambda number: abs(number.error))
    nine_tenths = sizes[min(len(sizes) - 1, -(-9 * len(sizes) // 10) - 1)]
    return (
        format_count(len(some)),
        format_share(statistics.median(sizes), ".2f"),
        _signed(statistics.fmean(errors)),
        format_share(nine_tenths, ".2f"),
        _signed(worst.error),
        worst.case,
    )


def _signed(share: float) -> str:
    return format_share(share, "+.2f")


def _estimators(numbers: Sequence[Number]) -> list[Table]:
    """Compare other estimators with the predictions, on the numbers they answer."""
    compared = [number for number in numbers if number.estimates]
    if not compared:
        return []
    rows = [("this suite", *_answers(compared, lambda n: n.predicted), NOTHING)]
    tools = dict.fromkeys(name for number in compared for name in number.estimates)
    for tool in tools:

        def its(number: Number, tool: str = tool) -> int | None:
            return number.estimates.get(tool)

        answered = [n for n in compared if its(n) is not None]
        if not answered:
            continue
        ours = statistics.median(abs(n.error) for n in answered)
        rows.append((tool, *_answers(compared, its), format_share(ours, ".2f")))
    first, *rest = rows
    rest.sort(key=lambda row: float(row[2].removesuffix(" %")))
    return [
        Table(
            title="Other estimators on the same numbers",
            columns=ESTIMATOR_COLUMNS,
            rows=(first, *rest),
            notes=(
                f"Of {format_count(len(compared))} numbers of whole training runs; an "
                "estimator answers those whose settings it can express. Each was given "
                "the settings that its interface has; what it leaves out is in "
                "`benchmarks/published-estimates.csv`. Some of the numbers were used "
                "to fit an assumption of ours, and are marked in the table below.",
            ),
        )
    ]


def _answers(
    numbers: Sequence[Number], answer: Callable[[Number], int | None]
) -> tuple[str, ...]:
    pairs = [(answer(number), number.measured) for number in numbers]
    errors = [one / other - 1 for one, other in pairs if one is not None]
    return (
        format_count(len(errors)),
        format_share(statistics.median(map(abs, errors)), ".2f"),
        format_count(sum(abs(error) <= 0.1 for error in errors)),
        _signed(min(errors)),
        _signed(max(errors)),
    )


def _every_number(numbers: Sequence[Number]) -> Table:
    ordered = sorted(numbers, key=lambda number: -abs(number.error))
    return Table(
        title="Predictions of memory that others measured",
        columns=NUMBER_COLUMNS,
        rows=tuple(
            (
                *(number.source, number.case, number.device, number.quantity),
                format_bytes(number.measured),
                format_bytes(number.predicted),
                _error(number),
                number.note,
            )
            for number in ordered
        ),
        num_text_columns=4,
        notes=("Largest error first. The sources are in the file of checks.",),
    )


def _error(number: Number) -> str:
    shown = _signed(number.error)
    if not number.is_calibration:
        return shown
    # The number was met by choice, so that its error is no error of a prediction.
    return ShownNumber(f"{shown} (fitted)", "fraction", None, fitted=number.error)


def _grouped(
    numbers: Iterable[Number], key: Callable[[Number], tuple[str, ...]]
) -> dict[tuple[str, ...], list[Number]]:
    groups: dict[tuple[str, ...], list[Number]] = {}
    for number in numbers:
        groups.setdefault(key(number), []).append(number)
    return groups
