"""Score against k, the number of bits that the exact methods lose."""

import pandas as pd
from matplotlib.figure import Figure

from meft_reports.methods import in_floats, is_exact
from meft_reports.plots import canvas
from meft_reports.plots.score_curves import draw_along

TITLE = "Score against lost bits"
CAPTION = (
    "The exact methods scale a stream by 2^-k and keep the k bits that this drops. One "
    "line per method: the mean over its seeds, with bars of one sample standard "
    "deviation. Horizontal lines, with a band of the same width, are full fine-tuning "
    "and the method with the paper's scales, each at its best setting; the dashed grey "
    "line is always answering the most frequent training label. Higher is better."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per task and workload in which k takes two values.

    Raises:
        NothingToDraw: there is none.
    """
    return draw_along(
        frame,
        "lost_bits",
        "lost bits k (the scale is 2^-k)",
        along=_exact,
        references=lambda method: ("full", in_floats(method)),
    )


def _exact(rows: pd.DataFrame) -> pd.DataFrame:
    exact = rows[rows["method"].map(is_exact).astype(bool)]
    return exact.assign(x=exact["lost_bits"])
