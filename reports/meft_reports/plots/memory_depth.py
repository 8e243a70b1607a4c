"""Memory against depth: the memory of one more block with each method."""

import pandas as pd
from matplotlib.figure import Figure

from meft_reports.plots import canvas
from meft_reports.plots.memory_curves import draw_along

TITLE = "Memory against depth"
CAPTION = (
    "One training step on random input of exact shape, with blocks of the backbone "
    "taken or repeated. Left: distinct storage that autograd keeps for the backward "
    "pass, counted by hooks, parameters excluded. Right: the highest tensor memory "
    "during the step, model-state memory included. Lower is better; a flat line does "
    "not pay for depth. A cross at the upper edge is a cell that failed there."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw two panels per workload that was measured at two depths or more.

    Raises:
        NothingToDraw: there is none.
    """
    return draw_along(frame, "depth", "num_blocks", "depth (blocks)")
