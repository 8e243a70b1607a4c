"""The largest value of each method, as `fit` has found it: of a sequence, of a batch.

Cells of a search agree in all but the method, its options and the value, which is the
answer. A method stays on the device if a step copies less than `FEW_BYTES` to the host.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from meft_reports.format import ShownNumber, format_count, is_null
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.methods import is_meft
from meft_reports.searches import FIELDS, LONGEST, is_at_least, options_in_words
from meft_reports.summary import (
    PROVENANCE,
    WORKLOAD,
    by_method,
    prepare,
    split,
)
from meft_reports.tables.table import join_options

NEEDS = "records that `fit` wrote with `--maximize seq`, of which one fits a sequence"
"""What the records must hold."""
FEW_BYTES = 2**20
QUESTION = "sweep_caveats"
"""Column with the margin and what else a search has asked."""


def find(
    frame: pd.DataFrame, search: str = LONGEST
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the cells of each search, in the order of methods, with its title.

    The cells have a column `name`, of the method with the options in which it differs
    from others of the frame, `fits`, whether a sequence was found, `stays`, whether
    it stays on the device, and `is_at_least`, whether a longer one may fit too.

    Args:
        frame: the frame of `meft_reports.frame`.
        search: which search, by what its records call it; for another than that of
            sequences, read "value" for sequence here.
    """
    field = FIELDS[search]
    rows = prepare(frame)
    rows = rows[(rows["sweep"] == search) & rows["status"].isin(("ok", "oom"))]
    # A length of 0 is none: such a record is not of a search.
    rows = rows.assign(fits=(rows["status"] == "ok") & (rows[field] > 0))
    if not rows["fits"].any():
        return
    place = [n for n in (*WORKLOAD, *PROVENANCE) if n != field]
    always = ("backbone", "dtype", "weights_dtype", "batch_size", "device")
    shown = [n for n in fields_to_show(rows, always) if n in place]
    options = options_in_words(rows[QUESTION].fillna(""))
    rows = rows.sort_values(["mlp_chunks", "side_buffer"], kind="stable")
    for _, part in split(by_method(rows), [*place, QUESTION]):
        asked = part[QUESTION].iloc[0]
        its_options = options["" if is_null(asked) else asked]
        names = [
            join_options(row["method"], option_label(row, rows))
            for _, row in part.iterrows()
        ]
        stays = part["d2h_bytes"].fillna(0) < FEW_BYTES
        endings = zip(part["sweep"], part["status"], part["message"], strict=True)
        title = describe(part, shown)
        yield (
            f"{title} · {its_options}" if its_options else title,
            part.assign(
                name=names,
                stays=stays,
                is_at_least=[is_at_least(*ending) for ending in endings],
            ),
        )


def words_of(cell: "pd.Series[Any]", field: str = "seq_len") -> str:
    """Return the largest value that fits in words.

    Args:
        cell: a cell of a search.
        field: the field that the search has maximized.
    """
    words: str = format_count(cell[field])
    if not cell["is_at_least"]:
        return words
    least = {"at least": cell[field]}
    return ShownNumber(f"≥ {words}", "count", None, **least)


def best_rival(
    part: pd.DataFrame, *, stays: bool, field: str = "seq_len"
) -> "pd.Series[Any] | None":
    """Return the cell with the longest sequence of methods other than MEFT.

    Args:
        part: the cells of a search.
        stays: whether it stays on the device.
        field: the field that the search has maximized.
    """
    return _best(part[~_is_meft(part)], stays, field)


def best_of_ours(
    part: pd.DataFrame, *, stays: bool, field: str = "seq_len"
) -> "pd.Series[Any] | None":
    """Return the cell with the longest sequence of MEFT's methods.

    Args:
        part: the cells of a search.
        stays: whether it stays on the device.
        field: the field that the search has maximized.
    """
    return _best(part[_is_meft(part)], stays, field)


def _is_meft(part: pd.DataFrame) -> "pd.Series[bool]":
    return part["method"].map(is_meft).astype(bool)


def _best(part: pd.DataFrame, stays: bool, field: str) -> "pd.Series[Any] | None":
    cells = part[part["fits"] & (part["stays"] == stays)]
    if cells.empty:
        return None
    # Of equal values, the one that needs the least memory.
    order = cells.assign(spare=-cells["peak_reserved_bytes"].fillna(0))
    return order.sort_values([field, "spare"], kind="stable").iloc[-1]
