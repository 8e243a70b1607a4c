"""The headline as a figure: what a step of every method takes on a real GPU."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from meft_reports.errors import NothingDeclared
from meft_reports.headline import METHODS, NEEDS, find
from meft_reports.plots import canvas
from meft_reports.style import look

TITLE = "What a step takes"
CAPTION = (
    "The peak of GPU memory in one training step, measured: weights and optimizer "
    "state (grey), and activations, gradients included (coloured). The number is the "
    "whole bar, in GiB."
)
GIB = 2**30
STATE = "#b9b9b9"


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """One bar per method.

    Raises:
        NothingDeclared: no workload on a real GPU has all of the methods.
    """
    found = find(frame)
    if found is None:
        raise NothingDeclared(f"needs {NEEDS}")
    title, cells = found
    figure, (axes,) = canvas.panels(1, num_columns=1)
    for place, method in enumerate(METHODS):
        state = float(cells[method]["model_state_bytes"]) / GIB
        peak = float(cells[method]["peak_allocated_bytes"]) / GIB
        axes.barh(place, state, color=STATE, height=0.65)
        color = look(method).color
        axes.barh(place, peak - state, left=state, color=color, height=0.65)
        axes.annotate(
            f"{peak:.1f}",
            (peak, place),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
        )
    axes.set_yticks(range(len(METHODS)), METHODS.values())
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("peak GPU memory of a training step (GiB)")
    canvas.set_title(axes, title)
    figure.legend(
        handles=[
            Patch(color=STATE, label="weights, optimizer state"),
            *(Patch(color=look(m).color, label=f"activations, {m}") for m in METHODS),
        ],
        loc="outside right upper",
    )
    return figure
