"""Recall of routed against exact top-k, block by block."""

import pandas as pd
from matplotlib.figure import Figure

from meft_reports.methods import has_experts
from meft_reports.plots import canvas
from meft_reports.plots.neuron_lists import draw_lists

TITLE = "Neurons that the router finds"
CAPTION = (
    "Of the neurons that a token would keep if every neuron were scored, the "
    "share that it keeps by way of its router: the mean over the tokens of a full "
    "batch, after training. 1 is what a router without error would reach."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per workload, one line per method and number of neurons.

    Raises:
        NothingToDraw: no such cell ended well.
    """
    return draw_lists(
        frame,
        "routing_recall",
        has_experts,
        lambda length: list(range(length)),
        ("block (0 is the lowest)", "recall of the best neurons"),
    )
