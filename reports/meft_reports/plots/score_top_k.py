"""Score against K, the number of neurons per token (Hao et al., ACL 2024, figure 6)."""

import pandas as pd
from matplotlib.figure import Figure

from meft_reports.methods import is_sparse
from meft_reports.plots import canvas
from meft_reports.plots.score_curves import draw_along

TITLE = "Score against neurons kept by a token"
CAPTION = (
    "Sparse adapters run K of a block's neurons for each token. One line per method: "
    "the mean over its seeds, with bars of one sample standard deviation where there "
    "are several. The horizontal line is the dense adapter of as many neurons, all of "
    "which run; the dashed grey line is always answering alike. Higher is better."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per task and workload in which K takes two values.

    Raises:
        NothingToDraw: there is none.
    """
    return draw_along(
        frame,
        "top_k_neurons",
        "neurons kept by a token, K",
        along=_sparse,
        references=lambda method: ("dense",),
    )


def _sparse(rows: pd.DataFrame) -> pd.DataFrame:
    sparse = rows[rows["method"].map(is_sparse).astype(bool)]
    return sparse.assign(x=sparse["top_k_neurons"])
