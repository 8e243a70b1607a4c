"""The longest sequence of each method on each GPU, as bars."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from meft_reports.errors import NothingDeclared
from meft_reports.format import format_bytes
from meft_reports.longest import NEEDS, find, words_of
from meft_reports.plots import canvas
from meft_reports.style import look

TITLE = "The longest sequence"
CAPTION = (
    "The longest sequence with which a training step fits on a GPU, one row per batch. "
    "The number in brackets is what the step copies over the link between host and "
    "device, in both directions; hollow bars are of methods that copy activations. "
    "Further to the right is better."
)
ROW_INCHES = 0.24


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per GPU and backbone, one bar per method.

    Raises:
        NothingDeclared: no search has found a sequence.
    """
    found = list(find(frame))
    if not found:
        raise NothingDeclared(f"no longest sequences, which need {NEEDS}")
    heights = [1.2 + ROW_INCHES * len(part) for _, part in found]
    figure, grid = canvas.panels(len(found), 1, heights)
    for axes, (title, part) in zip(grid, found, strict=True):
        _draw_panel(axes, part)
        canvas.set_title(axes, title)
    return figure


def _draw_panel(axes: Axes, part: pd.DataFrame) -> None:
    for place, (_, cell) in enumerate(part.iterrows()):
        fits = cell["fits"]
        length = int(cell["seq_len"]) if fits else 0
        color = look(cell["method"]).color
        axes.barh(
            place,
            length,
            color=color if cell["stays"] else "white",
            edgecolor=color,
            linewidth=1.5,
            height=0.65,
        )
        axes.annotate(
            f" {_words(cell)}" if fits else " does not fit",
            (length, place),
            verticalalignment="center",
        )
    axes.margins(x=0.25)
    axes.set_yticks(range(len(part)), part["name"].tolist())
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(left=0)
    axes.set_xlabel("longest sequence (tokens)")


def _words(cell: "pd.Series[Any]") -> str:
    words = words_of(cell)
    if not cell["stays"]:
        words += f" ({format_bytes(cell['transfer_bytes'])})"
    return words
