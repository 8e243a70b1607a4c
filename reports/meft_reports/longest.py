"""The longest sequence of each method, as `fit` has found it (`--maximize seq`).

Cells of a search agree in all but the method, its options and the length, which is the
answer. A method stays on the device if a step copies less than `FEW_BYTES` to the host.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from meft_reports.format import ShownNumber, format_count
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.methods import is_meft
from meft_reports.searches import LONGEST, is_at_least
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
_PLACE = [n for n in (*WORKLOAD, *PROVENANCE) if n != "seq_len"]
_QUESTION = "sweep_caveats"
"""Column with the margin and what else a search has asked."""


def find(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the cells of each search, in the order of methods, with its title.

    The cells have a column `name`, of the method with the options in which it differs
    from others of the search, `fits`, whether a sequence was found, `stays`, whether
    it stays on the device, and `is_at_least`, whether a longer one may fit too.

    Args:
        frame: the frame of `meft_reports.frame`.
    """
    rows = prepare(frame)
    rows = rows[(rows["sweep"] == LONGEST) & rows["status"].isin(("ok", "oom"))]
    # A length of 0 is none: such a record is not of a search.
    rows = rows.assign(fits=(rows["status"] == "ok") & (rows["seq_len"] > 0))
    if not rows["fits"].any():
        return
    always = ("backbone", "dtype", "weights_dtype", "batch_size", "device")
    shown = [n for n in fields_to_show(rows, always) if n in _PLACE]
    rows = rows.sort_values(["mlp_chunks", "side_buffer"], kind="stable")
    for _, part in split(by_method(rows), [*_PLACE, _QUESTION]):
        names = [
            join_options(row["method"], option_label(row, part))
            for _, row in part.iterrows()
        ]
        stays = part["d2h_bytes"].fillna(0) < FEW_BYTES
        endings = zip(part["sweep"], part["status"], part["message"], strict=True)
        yield (
            describe(part, shown),
            part.assign(
                name=names,
                stays=stays,
                is_at_least=[is_at_least(*ending) for ending in endings],
            ),
        )


def words_of(cell: "pd.Series[Any]") -> str:
    """Return the longest sequence of a cell in words."""
    words: str = format_count(cell["seq_len"])
    if not cell["is_at_least"]:
        return words
    least = {"at least": cell["seq_len"]}
    return ShownNumber(f"≥ {words}", "count", None, **least)


def best_rival(part: pd.DataFrame, *, stays: bool) -> "pd.Series[Any] | None":
    """Return the cell with the longest sequence of methods other than MEFT.

    Args:
        part: the cells of a search.
        stays: whether it stays on the device.
    """
    is_rival = ~part["method"].map(is_meft).astype(bool)
    rivals = part[is_rival & part["fits"] & (part["stays"] == stays)]
    if rivals.empty:
        return None
    return rivals.sort_values("seq_len", kind="stable").iloc[-1]
