"""How far each method starts from the backbone's function, for a table and a figure."""

import pandas as pd

from meft_reports.methods import is_meft, rebuilt
from meft_reports.summary import PROVENANCE, WORKLOAD, prepare, split

PLACE = [name for name in (*WORKLOAD, *PROVENANCE) if name != "depth"]
"""What two deviations must share to stand in one table or panel."""


def start_deviations(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per place, method, number of blocks and k: the mean over ok cells.

    A method and its plain twin are the same function; both count as the method.
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
