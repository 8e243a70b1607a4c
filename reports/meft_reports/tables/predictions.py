"""Predictions compared with the GPU itself: the same cell on both, peak by peak.

A pair is one cell that ran on `cuda` and on the virtual GPU of the same name.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from meft_reports.format import (
    NOTHING,
    format_bytes,
    format_count,
    format_share,
    is_null,
)
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.summary import OPTIONS, WORKLOAD, prepare
from meft_reports.tables.table import (
    METHOD,
    WORKLOAD_NAME,
    Heading,
    Table,
    join_options,
)

COMPARED = ("saved_bytes", "peak_allocated_bytes", "peak_reserved_bytes")


def _both(name: str, quantity: str) -> tuple[Heading, ...]:
    """Return columns of a quantity on the GPU, its prediction, and the error."""
    return (
        Heading(f"{name}, measured", f"{quantity}, measured on the GPU."),
        Heading("predicted", f"{quantity}, predicted for that GPU."),
        Heading("error", f"Relative error of the prediction of {quantity.lower()}."),
    )


COLUMNS = (
    METHOD,
    WORKLOAD_NAME,
    *_both("saved", "Bytes saved for backward"),
    *_both("allocated", "Peak of allocated bytes"),
    *_both("reserved", "Peak of reserved bytes"),
    Heading("seed", "Seed of the cell."),
)
SUMMARY_COLUMNS = (
    Heading("quantity", "What is predicted."),
    Heading("cells", "Number of cells with a measurement and a prediction."),
    Heading("median error", "Median of the relative errors without their sign."),
    Heading("90 % of errors below", "90th percentile of them."),
    Heading("worst error", "Relative error that is largest without its sign."),
    Heading("of", "Cell with the worst error."),
)
NOTES = (
    "Measured by `torch.cuda`, predicted by fake tensors and a model of the caching "
    "allocator. An error above 0 is a prediction that is too high.",
)


SUMMARY_NOTES = (
    "Over all cells below; errors without their sign, but for the worst. Cells of "
    "sparse adapters are predicted with the share of neurons that `active_fraction` "
    "of the cell says.",
)
SHOWN = ("backbone", "dtype", "batch_size", "seq_len", "attention")


NEEDS = "the same ok cell on the device cuda and on the virtual GPU of the same name"
"""What the records must hold for there to be a table."""


def make(frame: pd.DataFrame) -> list[Table]:
    """Return two tables per GPU: a summary of the errors, and every cell.

    A GPU is included if it ran cells that its virtual counterpart also ran.
    """
    rows = prepare(frame)
    rows = rows[(rows["status"] == "ok") & rows["device_name"].notna()]
    tables = []
    for name, part in rows.groupby("device_name", sort=True):
        found = _pairs(part)
        if found:
            title = f"Predictions held against {name}"
            tables.append(
                Table(
                    title=f"{title}: summary",
                    columns=SUMMARY_COLUMNS,
                    rows=tuple(_summary(part)),
                    num_text_columns=1,
                    notes=SUMMARY_NOTES,
                )
            )
            tables.append(
                Table(
                    title=title,
                    columns=COLUMNS,
                    rows=tuple(found),
                    num_text_columns=2,
                    notes=NOTES,
                )
            )
    return tables


def _summary(part: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    """Yield the errors of each quantity over all cells."""
    measured, predicted = _sides(part)
    for quantity in COMPARED:
        errors: dict[Any, float] = {}
        for index, row in measured.iterrows():
            other = predicted.get(_key(row))
            if other is not None and _are_known(row[quantity], other[quantity]):
                errors[index] = other[quantity] / row[quantity] - 1
        if not errors:
            continue
        sizes = pd.Series(errors).abs()
        worst = max(errors, key=lambda index: abs(errors[index]))
        row = measured.loc[worst]
        yield (
            quantity.removesuffix("_bytes").replace("_", " "),
            format_count(len(errors)),
            format_share(float(sizes.median()), ".3f"),
            format_share(float(sizes.quantile(0.9)), ".2f"),
            format_share(errors[worst], "+.2f"),
            f"{row['method']}, {describe(measured.loc[[worst]], SHOWN)}"
            if errors[worst]
            else NOTHING,
        )


def _sides(part: pd.DataFrame) -> tuple[pd.DataFrame, dict[tuple[Any, ...], Any]]:
    """Return the measured cells, and the predicted ones by key."""
    predicted = {
        _key(row): row for _, row in part[part["source"] == "predicted"].iterrows()
    }
    measured = part[(part["source"] == "measured") & (part["device"] == "cuda")]
    return measured, predicted


def _are_known(one: Any, other: Any) -> bool:
    return not is_null(one) and not is_null(other) and bool(one)


def _pairs(part: pd.DataFrame) -> list[tuple[str, ...]]:
    measured, predicted = _sides(part)
    shown = fields_to_show(part, always=("task", "backbone", "dtype", "batch_size"))
    shown = [name for name in shown if name in WORKLOAD and name != "device"]
    return [
        (
            join_options(row["method"], option_label(row, measured)),
            describe(measured.loc[[index]], shown),
            *_compared(row, predicted[_key(row)]),
            format_count(row["seed"]),
        )
        for index, row in measured.iterrows()
        if _key(row) in predicted
    ]


def _key(row: "pd.Series[Any]") -> tuple[Any, ...]:
    """Return all fields of a cell except its device."""
    names = [n for n in (*WORKLOAD, *OPTIONS, "method", "seed") if n != "device"]
    return tuple(None if is_null(row[name]) else row[name] for name in names)


def _compared(
    measured: "pd.Series[Any]", predicted: "pd.Series[Any]"
) -> tuple[str, ...]:
    cells: list[str] = []
    for name in COMPARED:
        one, other = measured[name], predicted[name]
        cells += [format_bytes(one), format_bytes(other)]
        known = _are_known(one, other)
        cells.append(format_share(other / one - 1, "+.2f") if known else NOTHING)
    return tuple(cells)
