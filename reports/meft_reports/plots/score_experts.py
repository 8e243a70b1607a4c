"""Score against the number of experts (Hao et al., ACL 2024, figure 7)."""

import pandas as pd
from matplotlib.figure import Figure

from meft_reports.methods import has_experts
from meft_reports.plots import canvas
from meft_reports.plots.score_curves import draw_along

TITLE = "Score against number of experts"
CAPTION = (
    "A router chooses some experts for each token, and the token's neurons among "
    "theirs; more experts are smaller ones, of which more are chosen. One line per "
    "method: the mean over its seeds, with bars of one sample standard deviation where "
    "there are several. Horizontal lines are the same without experts and the dense "
    "adapter; the dashed grey line is always answering alike. Higher is better."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per task and workload in which the number takes two values.

    Raises:
        NothingToDraw: there is none.
    """
    return draw_along(
        frame,
        "num_experts",
        "experts of a block",
        along=_routed,
        references=lambda method: ("sparse", "dense"),
        also=("top_k_experts",),
    )


def _routed(rows: pd.DataFrame) -> pd.DataFrame:
    # 0 denotes a rule; the records do not contain the resulting number.
    is_named = rows["method"].map(has_experts).astype(bool) & (rows["num_experts"] > 0)
    routed = rows[is_named.fillna(False).astype(bool)]
    return routed.assign(x=routed["num_experts"])
