"""Capacity: what methods recall, by the bytes on the device of what they train.

Two tables for each workload with recalled bits. The first has one row for each setting.
In the second, each setting of MEFT is compared with each setting of another method that
takes no more bytes, on equal seeds, by a paired t-test over seeds; p-values of the
comparisons of one setting are adjusted by Holm's method (Scandinavian Journal of
Statistics, 1979), so that many ranks of LoRA do not make one of them differ by chance.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from meft_reports.format import (
    NOTHING,
    ShownNumber,
    format_bytes,
    format_count,
    format_difference,
    format_mean,
    format_ratio,
    format_score,
)
from meft_reports.intervals import holm, over_seeds
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.rivals import MARGIN, has_equal_memory, is_held_against, is_rival
from meft_reports.summary import (
    PROVENANCE,
    WORKLOAD,
    learned,
    prepare,
    settings,
    split,
    spread,
)
from meft_reports.tables.differences import difference, show_interval
from meft_reports.tables.table import METHOD, Heading, Table, join_options, notes_on

OF_SETTINGS = (
    METHOD,
    Heading("seeds", "Number of seeds."),
    Heading("on the device", "Bytes on the device of what trains."),
    Heading("exact recall", "Share of facts that are recalled whole, over seeds."),
    Heading("interval", "Interval of 95 % of the exact recall over seeds."),
    Heading("tokens", "Share of tokens that are right, the mean over seeds."),
    Heading("bits", "Share of the bits of all facts that the model has."),
    Heading("bits per byte", "Bits of facts recalled whole for each of these bytes."),
    Heading("perplexity", "Perplexity of other text as a multiple of that before."),
)
OF_PAIRS = (
    METHOD,
    Heading("less", "Method of others that takes no more bytes on the device."),
    Heading("seeds", "Number of seeds that both methods trained with."),
    Heading("its bytes", "Bytes on the device of the other method."),
    Heading("difference", "Mean difference of exact recall of equal seeds."),
    Heading("interval", "Interval of 95 % of the difference, over seeds."),
    Heading("p, by Holm", "p-value of the difference, adjusted for all of the method."),
)
NOTES = (
    "Bytes on the device are those of parameters that train, their gradients and "
    "optimizer state, slots of rows and routers. Mean over seeds ± sample standard "
    "deviation; intervals of 95 % by Student's t, which few seeds make wide.",
)
NOTES_ON_PAIRS = (
    f"Other methods that take at most {MARGIN:g} times the bytes on the device. "
    "Intervals of 95 % and p-values of a paired t-test over seeds; p-values are "
    "adjusted by Holm's method for the comparisons of one method. Where 0 lies in an "
    "interval, the difference is not significant.",
)
EQUAL = ("train_rows", "eval_rows", "max_steps", "accumulation")
"""Fields that two arms must agree in: the same facts, and as many exposures."""
NEEDS = "recalled bits and bytes on the device, as cells of `facts-random` have them"
"""What the records must hold for there to be a table."""


class _Arm(NamedTuple):
    name: str
    method: str
    rows: pd.DataFrame
    device_bytes: float


def make(frame: pd.DataFrame) -> list[Table]:
    """Return one or two tables per workload with recalled bits."""
    rows = learned(prepare(frame))
    rows = rows[(rows["status"] == "ok") & rows["bits_per_device_byte"].notna()]
    shown = fields_to_show(rows, always=("task", "backbone", "dtype"))
    tables = []
    for _, part in split(rows, [*WORKLOAD, *PROVENANCE]):
        every = [_arm(one, part) for one in settings(part)]
        title = describe(part, shown)
        tables.append(
            Table(
                title=f"Capacity · {title}",
                columns=OF_SETTINGS,
                rows=tuple(map(_row, every)),
                notes=(*NOTES, *notes_on(part)),
            )
        )
        own = [one for one in every if is_held_against(one.method)]
        pairs = [row for one in own for row in _pairs(one, every)]
        if pairs:
            tables.append(
                Table(
                    title=f"At equal bytes on the device · {title}",
                    columns=OF_PAIRS,
                    rows=tuple(pairs),
                    num_text_columns=2,
                    notes=NOTES_ON_PAIRS,
                )
            )
    return tables


def _arm(rows: pd.DataFrame, part: pd.DataFrame) -> _Arm:
    first = rows.iloc[0]
    return _Arm(
        name=join_options(first["method"], option_label(first, part)),
        method=first["method"],
        rows=rows.set_index("seed"),
        device_bytes=float(rows["trainable_device_bytes"].mean()),
    )


def _row(one: _Arm) -> tuple[str, ...]:
    scores = [float(value) for value in one.rows["score"]]
    means = {
        name: one.rows[name].astype(float).mean()
        for name in (
            "second_score",
            "third_score",
            "bits_per_device_byte",
            "guard_ratio",
        )
    }
    return (
        one.name,
        format_count(len(scores)),
        format_bytes(one.device_bytes),
        format_mean(sum(scores) / len(scores), spread(scores)),
        show_interval(over_seeds(scores)),
        format_score(means["second_score"]),
        format_score(means["third_score"]),
        ShownNumber(
            f"{means['bits_per_device_byte']:.4f}", "", means["bits_per_device_byte"]
        ),
        format_ratio(means["guard_ratio"]),
    )


def _pairs(one: _Arm, every: Sequence[_Arm]) -> list[tuple[str, ...]]:
    """Return the rows of the comparisons of one setting."""
    known = [
        (other, found)
        for other in every
        if is_rival(other.method)
        and all(_value(one, name) == _value(other, name) for name in EQUAL)
        and has_equal_memory(other.device_bytes, one.device_bytes)
        and (found := difference(one.rows, other.rows)) is not None
    ]
    adjusted = holm([found.over_seeds.p for _, found in known])
    return [
        (
            one.name,
            other.name,
            format_count(found.num_seeds),
            format_bytes(other.device_bytes),
            format_difference(found.over_seeds.mean),
            show_interval(found.over_seeds),
            NOTHING if found.over_seeds.low is None else ShownNumber(f"{p:.3f}", "", p),
        )
        for (other, found), p in zip(known, adjusted, strict=True)
    ]


def _value(one: _Arm, name: str) -> Any:
    return one.rows[name].iloc[0]
