"""Score against peak memory of each method.

There is one point per method, the mean over seeds; bars are the sample standard
deviation in both directions. There is one panel per task and workload.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.format import MIB
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.plots import canvas
from meft_reports.plots.score_curves import draw_majority, majority_entry
from meft_reports.style import look
from meft_reports.summary import PROVENANCE, WORKLOAD, learned, split, summarise

TITLE = "Score against peak memory"
CAPTION = (
    "Each point is one method: the mean over its seeds, with bars of one sample "
    "standard deviation. Across: the highest tensor memory during one training step, "
    "model-state memory included. Up: the task's metric on the evaluation split. The "
    "dashed line is the score of always answering the most frequent training label. "
    "Up and to the left is better. Points of one method are its settings."
)
HAVE_THEIR_OWN = ("lost_bits", "reversible_blocks")
"""Options with their own figure; their many points have no room for labels."""
VALUES = ("score", "peak_allocated_bytes", "majority_score")


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per task and workload.

    Raises:
        NothingToDraw: no ok cell has both a score and a peak.
    """
    rows = learned(frame)
    if rows.empty:
        raise NothingDeclared("no cell was declared on a real task")
    known = rows[["score", "peak_allocated_bytes"]].notna().all(axis=1)
    if not (known & (rows["status"] == "ok")).any():
        raise NothingToDraw("no ok cell has both a score and a peak of memory")
    table = summarise(rows, VALUES)
    parts = [part for _, part in split(table, [*WORKLOAD, *PROVENANCE])]
    parts = [
        p for p in parts if p[["score", "peak_allocated_bytes"]].notna().any().all()
    ]
    shown = fields_to_show(table, always=("task", "backbone", "dtype"))
    metrics = rows.groupby("task")["score_name"].first()
    figure, grid = canvas.panels(len(parts), num_columns=2)
    for axes, part in zip(grid, parts, strict=True):
        _draw_panel(axes, part, str(metrics[part["task"].iloc[0]]))
        canvas.set_title(axes, describe(part, shown))
    canvas.add_legend(figure, table["method"], [majority_entry()])
    canvas.add_note(figure, canvas.failures_note(rows[rows["status"] != "ok"]))
    return figure


def _draw_panel(axes: Axes, part: pd.DataFrame, metric: str) -> None:
    drawn = part.dropna(subset=["score", "peak_allocated_bytes"])
    for _, row in drawn.iterrows():
        its = look(row["method"])
        x, y = row["peak_allocated_bytes"] / MIB, row["score"]
        axes.errorbar(
            x,
            y,
            xerr=_or_zero(row["peak_allocated_bytes_spread"]) / MIB,
            yerr=_or_zero(row["score_spread"]),
            fmt=its.marker,
            color=its.color,
            markerfacecolor=its.face,
            capsize=2,
            elinewidth=1,
        )
        axes.annotate(
            option_label(row, drawn, HAVE_THEIR_OWN),
            (x, y),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=7,
        )
    draw_majority(axes, drawn)
    axes.set_xlim(left=0)
    axes.margins(y=0.1)
    axes.set_xlabel("peak allocated memory (MiB)")
    axes.set_ylabel(f"score ({metric})")


def _or_zero(spread: float | None) -> float:
    return 0.0 if spread is None or pd.isna(spread) else float(spread)
