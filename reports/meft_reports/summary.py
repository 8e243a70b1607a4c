"""Summarise cells that differ only in their seed as one row: mean, spread and count.

Records of two machines, code versions or torch versions are never averaged: a row is
identified by where the cells ran (`PROVENANCE`) in addition to what ran (`WORKLOAD`,
the method and its options). Cells that failed are counted, not averaged.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pandas as pd

from meft_reports.columns import CELL_FIELDS
from meft_reports.columns.measurement import OLD_SCORE_NAMES
from meft_reports.methods import is_sparse, uses
from meft_reports.searches import search_of
from meft_reports.style import method_order

WORKLOAD = (
    "task",
    "backbone",
    "depth",
    "dtype",
    "weights_dtype",
    "batch_size",
    "seq_len",
    "device",
    "attention",
    "blocks",
    "ranks",
    "parallel",
)
"""Cell fields that must agree in a comparison: one panel, one table part."""

OPTIONS = tuple(
    name for name in CELL_FIELDS if name not in {*WORKLOAD, "method", "seed"}
)
"""The other fields of a cell: options of the method, length of training."""

PROVENANCE = (
    *("machine", "code_sha256", "torch_version", "num_threads", "num_slots"),
    "weights_sha256",
)
"""Where a cell ran. Numbers from two such places are never combined."""

GROUP = (*WORKLOAD, "method", *OPTIONS, *PROVENANCE)

TRIAL = "validation"
"""What trials are scored on: rows set aside from those of training."""
FLAGS = ("random_weights", "equal_batches", "undecayed_rows")
"""Columns that `prepare` adds: facts that are noted wherever a row is shown."""


def on_random_input(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return whether each row's task has exact shapes, and nothing to learn."""
    return frame["task"].isin(("synthetic", "synthetic-lm"))


def learned(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the cells that learn a real task.

    Cells of one step, which measure the starting point of a method, are excluded, and
    cells interleaved with a reference method, which train for timing only; and trials,
    which are scored on other rows.
    """
    learns = ~on_random_input(frame) & (frame["max_steps"] > 1)
    return frame[learns & (frame["reference"] == "") & ~is_trial(frame)]


def is_trial(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return whether each row is a trial, by whose score a learning rate is chosen."""
    return frame["scored_on"] == TRIAL


def mean_list(lists: "pd.Series[Any]") -> list[float]:
    """Return the mean of lists of equal length, entry by entry."""
    return [sum(values) / len(values) for values in zip(*lists, strict=True)]


def summarise(frame: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Return one row per method, workload, options and environment.

    Numbers are averaged over seeds; the environment is that of `PROVENANCE`.

    Args:
        frame: rows of `read_frame`.
        columns: names of columns of numbers.

    Returns:
        The columns of `GROUP`; `num_seeds` (ok cells averaged), `num_failed`; for every
        name of `columns`, `NAME` (mean) and `NAME_spread` (sample standard deviation,
        null for fewer than two values); those of `FLAGS`.
    """
    columns = list(columns)
    # Every part that is split off is a copy of all its columns.
    needed = dict.fromkeys([*GROUP, *FLAGS, "status", "is_forked", *columns])
    known = prepare(frame)[list(needed)]
    rows = [_summary(part, columns) for _, part in split(known, GROUP)]
    names = [*GROUP, *FLAGS, "num_seeds", "num_failed"]
    names += [n for column in columns for n in (column, f"{column}_spread")]
    table = pd.DataFrame(rows, columns=pd.Index(names))
    means = dict.fromkeys(names[len(GROUP) + len(FLAGS) + 2 :], "float64")
    return by_method(table.astype(frame.dtypes[list(GROUP)].to_dict() | means))


def _summary(part: pd.DataFrame, columns: Sequence[str]) -> dict[str, Any]:
    ok = part[part["status"] == "ok"]
    row: dict[str, Any] = {name: part[name].iloc[0] for name in GROUP}
    row |= {name: part[name].any() for name in FLAGS}
    row["num_seeds"] = len(ok)
    # The resident memory of a fork lacks pages of libraries that it did not use.
    is_mixed = ok["is_forked"].nunique() > 1
    row["num_failed"] = len(part) - len(ok)
    for column in columns:
        values = [float(value) for value in ok[column].dropna()]
        if is_mixed and column == "peak_host_bytes":
            values = []
        row[column] = sum(values) / len(values) if values else None
        row[f"{column}_spread"] = spread(values)
    return row


def spread(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return float((sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5)


def worst(lists: "pd.Series[Any]") -> float | None:
    """Return the maximum of some lists; None if there is no number."""
    values = [value for errors in lists.dropna() for value in errors]
    # max() of a list with NaN depends on the order; NaN is the worst value.
    broken = [value for value in values if value != value]
    return float("nan") if broken else max(values, default=None)


def split(
    frame: pd.DataFrame, names: Sequence[str]
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield the parts of `frame` that agree in `names`, sorted; nulls are equal."""
    grouped = frame.groupby(list(names), dropna=False, sort=True)
    for values, part in grouped:
        yield dict(zip(names, values, strict=True)), part


def settings(
    rows: pd.DataFrame, ignoring: Sequence[str] = ()
) -> Iterator[pd.DataFrame]:
    """Yield the parts that agree in method and options, in the order of methods.

    Options that are `ignoring` may differ within a part.
    """
    names = ["method", *(name for name in OPTIONS if name not in ignoring)]
    # By group and not by row, so that a method's settings are in order too.
    parts = [part for _, part in split(rows, names)]
    yield from sorted(parts, key=lambda part: method_order(part["method"].iloc[0]))


def varying(frame: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """Return those of `names` that take more than one value in `frame`."""
    return [name for name in names if frame[name].nunique(dropna=False) > 1]


def by_method(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows in the order in which methods are always shown; stable."""
    order = frame["method"].map(method_order)
    return frame.loc[order.sort_values(kind="stable").index].reset_index(drop=True)


def prepare(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows in the form that tables and plots require.

    The torch version and number of blocks of failed cells are filled in as far as
    possible; `FLAGS` are columns; options that a method does not use are null. Of cells
    that are identical after this, with the same seed, one row is kept, an ok one if
    there is one.
    """
    rows = with_blocks_known(with_torch_known(frame))
    rows["random_weights"] = has_random_weights(rows)
    rows["equal_batches"] = has_equal_batches(rows)
    rows["undecayed_rows"] = has_undecayed_rows(rows)
    for name in OPTIONS:
        idle = [not uses(method, name) for method in rows["method"]]
        rows[name] = rows[name].mask(pd.Series(idle, index=rows.index, dtype=bool))
    first_ok = rows["status"].ne("ok").sort_values(kind="stable").index
    # Searches with other options may have the same answer.
    pairs = zip(rows["sweep"], rows["sweep_caveats"].fillna(""), strict=True)
    search = pd.Series([search_of(*pair) for pair in pairs], rows.index, dtype=object)
    numbered = rows.assign(search=search).loc[first_ok]
    same = numbered.duplicated([*GROUP, "search", "seed"])
    return rows.loc[~same.reindex(rows.index)]


def has_random_weights(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return whether each row's backbone had random weights, also for failed cells."""
    origin = frame["weights_origin"].fillna("").str.startswith("random")
    return (origin | frame["backbone"].str.startswith("random:")).astype(bool)


def has_equal_batches(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return whether micro-batches had equal weights in each row's steps.

    This is the case for language models in older code, regardless of their numbers of
    target tokens.
    """
    answers = frame["score_name"].isin(("options", *OLD_SCORE_NAMES.values()))
    is_old = answers & frame["loss_mean"].isna() & (frame["accumulation"] > 1)
    return is_old.astype(bool)


def has_undecayed_rows(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return whether weight decay excluded the rows of sparse adapters.

    This is the case for older code.
    """
    has_rows = [is_sparse(m) or m == "dense-offload" for m in frame["method"]]
    is_old = frame["loss_mean"].isna() & frame["score_name"].notna()
    return (is_old & pd.Series(has_rows, index=frame.index, dtype=bool)).astype(bool)


def with_torch_known(frame: pd.DataFrame) -> pd.DataFrame:
    """Fill in the torch version of cells that failed before they recorded it.

    It is that of the cells of the same machine and code, which must agree.
    """
    filled = frame.copy()
    for _, part in split(frame, ["machine", "code_sha256"]):
        known = part["torch_version"].dropna().unique()
        if len(known) == 1:
            filled.loc[part.index, "torch_version"] = known[0]
    return filled


def with_blocks_known(frame: pd.DataFrame) -> pd.DataFrame:
    """Fill in `num_blocks` of failed cells.

    It is that of the cells of the same backbone and depth if they agree, otherwise the
    requested depth.
    """
    filled = frame.copy()
    for key, part in split(frame, ["backbone", "depth"]):
        known = part["num_blocks"].dropna().unique()
        blocks = known[0] if len(known) == 1 else (key["depth"] or pd.NA)
        missing = part.index[part["num_blocks"].isna()]
        filled.loc[missing, "num_blocks"] = blocks
    return filled
