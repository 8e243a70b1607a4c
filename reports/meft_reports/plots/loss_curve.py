"""Training loss against step: whether a method learns, and how fast.

There is one thin line per seed, not an average of seeds that may have stopped at
different steps. The lines are smoothed by a running mean whose width the axis states.
"""

import math

import pandas as pd
from matplotlib.figure import Figure

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.plots import canvas
from meft_reports.summary import (
    PROVENANCE,
    WORKLOAD,
    learned,
    prepare,
    split,
)

TITLE = "Training loss"
CAPTION = (
    "Loss on the training batches, one line per seed, smoothed by a running mean over "
    "as many steps as the axis says. The step counts optimizer updates. Methods that "
    "end early stopped improving on validation rows."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per real task and workload.

    Raises:
        NothingToDraw: no ok cell of a real task has a loss curve of two steps.
    """
    rows = prepare(frame)
    rows = learned(rows)
    if rows.empty:
        raise NothingDeclared("no cell was declared on a real task")
    long_enough = [curve is not None and len(curve) > 1 for curve in rows["loss_curve"]]
    drawn = rows[long_enough & (rows["status"] == "ok").to_numpy(dtype=bool)]
    if drawn.empty:
        raise NothingToDraw("no ok cell of a real task has a loss curve of two steps")
    width = max(1, max(map(len, drawn["loss_curve"])) // 20)
    parts = [part for _, part in split(drawn, [*WORKLOAD, *PROVENANCE])]
    shown = fields_to_show(drawn, always=("task", "backbone", "dtype"))
    figure, grid = canvas.panels(len(parts), num_columns=2)
    for axes, part in zip(grid, parts, strict=True):
        for method, curve in zip(part["method"], part["loss_curve"], strict=True):
            smooth = running_mean(curve, width)
            style = canvas.line_style(method) | {"marker": "", "linewidth": 1.1}
            axes.plot(range(width, width + len(smooth)), smooth, **style)
        canvas.set_title(axes, describe(part, shown))
        axes.set_xlabel("step (optimizer updates)")
        axes.set_ylabel(f"training loss (mean of {width} steps)")
    canvas.add_legend(figure, drawn["method"])
    canvas.add_note(figure, canvas.failures_note(rows[rows["status"] != "ok"]))
    return figure


def running_mean(values: list[float], width: int) -> list[float]:
    """Return the means of all windows of `width` values; empty when there are fewer.

    The mean of a window with a value that is not finite is NaN.
    """
    windows = (values[i : i + width] for i in range(len(values) - width + 1))
    return [math.nan if _broken(w) else math.fsum(w) / width for w in windows]


def _broken(window: list[float]) -> bool:
    return not all(map(math.isfinite, window))
