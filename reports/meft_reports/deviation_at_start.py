"""Deviation of each method from the backbone's function at the start of training.

The data is used by a table and a figure.
"""

import pandas as pd

from meft_reports.methods import is_meft, rebuilt
from meft_reports.summary import PROVENANCE, WORKLOAD, prepare, split

PLACE = [name for name in (*WORKLOAD, *PROVENANCE) if name != "depth"]
"""Fields that deviations in one table or panel have in common."""


def start_deviations(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over ok cells by `PLACE`, method, number of blocks and k.

    There is one row for each. A method and its plain twin are the same function; both
    count as the method.
    """
    rows = prepare(frame)
    known = rows["start_deviation"].notna() & (rows["status"] == "ok")
    rows = rows[known & rows["method"].map(is_meft).astype(bool)]
    rows = rows.assign(method=rows["method"].map(rebuilt))
    means = [
        part.iloc[[0]].assign(start_deviation=part["start_deviation"].mean())
        for _, part in split(rows, [*PLACE, "method", "num_blocks", "lost_bits"])
    ]
    return pd.concat(means) if means else rows
