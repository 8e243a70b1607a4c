"""Common part of the figures of step time relative to a reference method.

There is one line per method or setting: the mean over cells, with bars as long as the
mean distance between the quartiles. The reference is a dotted line at 1.
"""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from meft_reports.plots import canvas

Line = tuple[pd.DataFrame, dict[str, Any]]
"""The rows of a line, and its style."""

DOTTED: dict[str, Any] = {"color": "#888888", "linestyle": ":"}
"""Style of the reference."""
LABEL = "time of a step (reference = 1)"


def draw_ratios(axes: Axes, part: pd.DataFrame, x: str, lines: list[Line]) -> None:
    """Draw the lines of one panel, side by side where they share a place.

    Args:
        axes: the panel.
        part: its rows, whose values of `x` are the ticks.
        x: name of the column of the x axis.
        lines: the lines; each has one point per value of `x`.
    """
    canvas.tick_at(axes, sorted(part[x].unique().tolist()))
    axes.axhline(1, linewidth=1, **DOTTED)
    for rank, (line, style) in enumerate(lines):
        means = line.groupby(x)[["step_ratio", "step_ratio_iqr"]].mean()
        axes.errorbar(
            [canvas.side_by_side(axes, n, rank, len(lines)) for n in means.index],
            means["step_ratio"],
            means["step_ratio_iqr"].fillna(0) / 2,
            capsize=2,
            elinewidth=1,
            **style,
        )
    axes.set_ylabel(LABEL)


def reference_entry(name: str) -> Line2D:
    """Return the legend's entry of the reference called `name`."""
    return Line2D([], [], label=f"{name} = 1", **DOTTED)
