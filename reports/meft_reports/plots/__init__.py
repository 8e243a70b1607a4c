"""The plots: one figure per file, each with the same parts.

    TITLE              what the figure is about
    CAPTION            what is measured, how, and how to read it
    draw(frame)        the figure; raises NothingToDraw with the reason, or
                       NothingDeclared where the run asked for nothing of the kind

A plot sees the frame of `meft_reports.frame` and nothing else. Add a plot by adding a
file and its name below, in the order of the page.
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
    "score_memory",
    "loss_curve",
    "step_seconds",
    "score_lost_bits",
    "score_reversible",
    "score_top_k",
    "score_experts",
    "memory_batch",
    "memory_depth",
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
    """What a module of this package offers."""

    TITLE: str
    CAPTION: str
    draw: "Callable[[pd.DataFrame], Figure]"


def find_plot(name: str) -> Plot:
    """The plot called `name`.

    Raises:
        UnknownName: there is none.
    """
    if name not in PLOTS:
        raise UnknownName("plot", name, PLOTS)
    plot: Plot = importlib.import_module(f"{__name__}.{name}")
    return plot
