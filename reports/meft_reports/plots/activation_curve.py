"""Sorted activations of neurons, which show how unequally neurons are used."""

import pandas as pd
from matplotlib.figure import Figure

from meft_reports.methods import has_neurons
from meft_reports.plots import canvas
from meft_reports.plots.neuron_lists import draw_lists

TITLE = "How unequally neurons are used"
CAPTION = (
    "Mean activation of each neuron over the tokens of a full batch, after "
    "training, averaged over blocks; neurons by size, as shares of the largest. A "
    "steep curve is a sparse one (figure 2 of Hao et al., ACL 2024)."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per workload, one line per method and number of neurons.

    Raises:
        NothingToDraw: no such cell ended well.
    """
    return draw_lists(
        frame,
        "activation_curve",
        has_neurons,
        lambda length: [i / max(length - 1, 1) for i in range(length)],
        ("neurons by size (share of all)", "activation (largest = 1)"),
        marker="",
    )
