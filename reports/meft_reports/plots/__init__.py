"""The plots: one figure per file, each with the same parts.

    TITLE              subject of the figure
    CAPTION            what is measured, how, and how to read it
    draw(frame)        the figure; raises NothingToDraw with the reason, or
                       NothingDeclared if the run has no cells of the kind

A plot uses only the frame of `meft_reports.frame`. Add a plot by adding a file and its
name below, in the order of the page.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from meft_reports.errors import UnknownName

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PLOTS = (
    "headline",
    "longest",
    "score_memory",
    "loss_curve",
    "step_seconds",
    "score_lost_bits",
    "score_reversible",
    "score_top_k",
    "score_experts",
    "memory_batch",
    "memory_depth",
    "savings",
    "step_ratio",
    "step_neurons",
    "traffic_neurons",
    "union_batch",
    "routing_recall",
    "activation_curve",
    "reconstruction",
    "gradient_depth",
    "start_deviation",
)


class Plot(Protocol):
    """The contents of a module of this package."""

    TITLE: str
    CAPTION: str
    draw: "Callable[[pd.DataFrame], Figure]"


def find_plot(name: str) -> Plot:
    """Return the plot called `name`.

    Raises:
        UnknownName: there is none.
    """
    if name not in PLOTS:
        raise UnknownName("plot", name, PLOTS)
    plot: Plot = importlib.import_module(f"{__name__}.{name}")
    return plot
