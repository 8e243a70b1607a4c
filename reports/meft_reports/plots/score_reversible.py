"""Score against the number of rebuilt blocks of a model."""

import pandas as pd
from matplotlib.figure import Figure

from meft_reports.methods import is_meft, is_stored, rebuilt
from meft_reports.plots import canvas
from meft_reports.plots.score_curves import draw_along

TITLE = "Score against reversible blocks"
CAPTION = (
    "Of a model's blocks the lowest are rebuilt in the backward pass, those above are "
    "stored. At 0 stands the plain twin, the same function with every block stored. "
    "One line per method: the mean over its seeds, with bars of one sample standard "
    "deviation. The black line, with a band of the same width, is full fine-tuning at "
    "its best setting; the dashed grey line is always answering the most frequent "
    "training label. Higher is better."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per task and workload in which that number takes two values.

    Raises:
        NothingToDraw: there is none.
    """
    return draw_along(
        frame,
        "reversible_blocks",
        "reversible blocks (lowest of the stack)",
        along=_num_rebuilt,
        references=lambda method: ("full",),
    )


def _num_rebuilt(rows: pd.DataFrame) -> pd.DataFrame:
    ours = rows[rows["method"].map(is_meft).astype(bool)]
    # 0 rebuilds all of them.
    requested = ours["reversible_blocks"].where(ours["reversible_blocks"] != 0)
    rebuilt_blocks = requested.astype("Float64").fillna(
        ours["num_blocks"].astype("Float64")
    )
    x = rebuilt_blocks.mask(ours["method"].map(is_stored).astype(bool), 0.0)
    # A twin has no lost bits, which could be elsewhere.
    place = ours["side_buffer"].fillna("device")
    return ours.assign(x=x, side_buffer=place, method=ours["method"].map(rebuilt))
