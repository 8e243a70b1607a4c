"""Step time relative to full fine-tuning in the same run.

Seconds on two machines are not comparable between methods; the ratio to `full`,
measured in the same run, is. Real tasks are drawn, or the synthetic workloads where
there are none.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.format import format_seconds
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.plots import canvas
from meft_reports.style import look
from meft_reports.summary import PROVENANCE, WORKLOAD, learned, split, summarise

TITLE = "Time of a step, relative to full fine-tuning"
CAPTION = (
    "One forward, backward and optimizer update: the median over the steps after "
    "warm-up, averaged over seeds, divided by that of full fine-tuning in the same "
    "workload on the same machine. The bar is as long as the distance between the "
    "quartiles. "
    "Further left is better."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per workload in which `full` was measured.

    Raises:
        NothingToDraw: there is none.
    """
    if not (frame["method"] == "full").any():
        raise NothingDeclared("no `full` cell was declared, to which others relate")
    real = learned(frame)
    rows = real if real["step_seconds"].notna().any() else frame
    table = summarise(rows, ["step_seconds", "step_seconds_iqr"])
    parts = [p for _, p in split(table, [*WORKLOAD, *PROVENANCE]) if _full(p)]
    if not parts:
        raise NothingToDraw("no workload has the step time of an ok `full` cell")
    drawn = pd.concat(parts)
    always = ["task", "backbone", "dtype"]
    if (drawn["num_slots"] > 1).any():
        always.append("num_slots")
    shown = fields_to_show(drawn, always=always)
    # Every setting of a method is a line of text.
    row_inches = max(2.9, 1 + 0.17 * max(map(len, parts)))
    figure, grid = canvas.panels(len(parts), num_columns=2, row_inches=row_inches)
    for axes, part in zip(grid, parts, strict=True):
        _draw_panel(axes, part)
        canvas.set_title(axes, describe(part, shown))
    # There is no legend: every line of a panel has the name of its method.
    failed = rows[rows["status"] != "ok"]
    canvas.add_note(figure, [*_load_note(drawn), *canvas.failures_note(failed)])
    return figure


def _load_note(drawn: pd.DataFrame) -> list[str]:
    """Return a line about cells that ran at the same time, if there are any."""
    if (drawn["num_slots"] == 1).all():
        return []
    return [
        "Where several cells ran at a time, each step took longer, by an amount that "
        "depends on the other cells: such ratios are rough. `step_ratio` compares two "
        "methods under the same load."
    ]


def _full(part: pd.DataFrame) -> float | None:
    """Return the seconds of a step of `full`, for the fastest of several settings."""
    seconds = part.loc[part["method"] == "full", "step_seconds"].dropna()
    seconds = seconds[seconds > 0]  # a ratio to 0 is not defined
    return float(seconds.min()) if len(seconds) else None


def _draw_panel(axes: Axes, part: pd.DataFrame) -> None:
    base = _full(part)
    assert base is not None
    measured = part.dropna(subset=["step_seconds"])
    for level, (_, row) in enumerate(measured.iterrows()):
        its = look(row["method"])
        iqr = 0.0 if pd.isna(row["step_seconds_iqr"]) else row["step_seconds_iqr"]
        axes.errorbar(
            row["step_seconds"] / base,
            level,
            xerr=iqr / 2 / base,
            fmt=its.marker,
            color=its.color,
            markerfacecolor=its.face,
            capsize=2,
            elinewidth=1,
        )
    names = [
        f"{row['method']} {option_label(row, measured)}".strip()
        for _, row in measured.iterrows()
    ]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(1, color="#888888", linestyle=":", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"time of a step (full = 1 = {format_seconds(base)})")
