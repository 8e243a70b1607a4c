"""Common part of the `score_...` figures along one option of a method.

There is one line per method and setting: the mean over seeds, with bars of one sample
standard deviation. Methods that do not use the option are horizontal lines with a band
of the same width. There is one panel per task and workload.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.format import is_null
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.plots import canvas
from meft_reports.style import look
from meft_reports.summary import (
    PROVENANCE,
    WORKLOAD,
    learned,
    prepare,
    settings,
    split,
    summarise,
)

Along = Callable[[pd.DataFrame], pd.DataFrame]
References = Callable[[str], Iterable[str]]

MAJORITY: dict[str, Any] = {"color": "#888888", "linestyle": "--"}
"""Style of the score of the majority class."""


def draw_along(
    frame: pd.DataFrame,
    field: str,
    label: str,
    along: Along,
    references: References,
    also: tuple[str, ...] = (),
) -> Figure:
    """Draw the score along the option `field`.

    Args:
        frame: rows of `read_frame`.
        field: an option of a cell; a panel needs two values of it.
        label: label of the x axis.
        along: selects, from one workload's rows, those that make lines, with a column
            `x` and the method that the line is named after.
        references: the methods that a line of some method is compared with.
        also: options that vary with `field` along a line.

    Raises:
        NothingToDraw: `field` takes two values in no workload of a real task, or no
            such cell has a score.
    """
    rows = prepare(frame)
    rows = learned(rows)
    places = [*WORKLOAD, *PROVENANCE]
    varied = (field, *also, "reference")
    if not any(_lines(along(part), varied) for _, part in split(rows, places)):
        raise NothingDeclared(
            f"no workload of a real task was declared at two values of `{field}`"
        )
    table = summarise(rows, ["score", "majority_score", "num_blocks"])
    parts = [
        (part, lines)
        for _, part in split(table, places)
        if (lines := _lines(along(part).dropna(subset=["score", "x"]), varied))
    ]
    if not parts:
        raise NothingToDraw(f"no workload has a score at two values of `{field}`")
    shown = fields_to_show(table, always=("task", "backbone", "dtype"))
    metrics = rows.groupby("task")["score_name"].first()
    figure, grid = canvas.panels(len(parts), num_columns=2)
    methods: set[str] = set()
    for axes, (part, lines) in zip(grid, parts, strict=True):
        methods |= _draw_panel(axes, part, lines, varied, references)
        canvas.set_title(axes, describe(part, shown))
        axes.set_xlabel(label)
        axes.set_ylabel(f"score ({metrics[part['task'].iloc[0]]})")
    canvas.add_legend(figure, methods, [majority_entry()])
    failed = rows[(rows["status"] != "ok") & rows["method"].isin(methods)]
    canvas.add_note(figure, canvas.failures_note(failed))
    return figure


def draw_majority(axes: Axes, part: pd.DataFrame) -> None:
    """Draw a line at the score of the majority class of each task of `part`."""
    for majority in part["majority_score"].dropna().unique():
        axes.axhline(majority, linewidth=1, **MAJORITY)


def majority_entry() -> Line2D:
    """Return the legend's entry of `draw_majority`."""
    return Line2D([], [], label="majority class", **MAJORITY)


def _lines(rows: pd.DataFrame, varied: tuple[str, ...]) -> list[pd.DataFrame]:
    """Return the settings of a method in which the first of `varied` takes two values.

    A setting with one value, as of a plain twin alone, is a point and not a line.
    """
    lines = settings(rows, ignoring=varied)
    return [line for line in lines if line[varied[0]].nunique() > 1]


def _draw_panel(
    axes: Axes,
    part: pd.DataFrame,
    lines: list[pd.DataFrame],
    varied: tuple[str, ...],
    references: References,
) -> set[str]:
    """Draw the lines and their references; return the methods that are drawn.

    Args:
        axes: the panel.
        part: all rows of the workload.
        lines: the rows of each line.
        varied: options that vary along a line.
        references: the methods that a line of some method is compared with.
    """
    drawn = pd.concat(lines)
    # Not a set, whose order differs from process to process.
    others = dict.fromkeys(
        m for name in drawn["method"].unique() for m in references(name)
    )
    shown = {method for method in others if _draw_reference(axes, part, method, drawn)}
    for rank, line in enumerate(lines):
        ordered, method = line.sort_values("x"), line["method"].iloc[0]
        style = canvas.line_style(method, rank + 2)
        spreads = ordered["score_spread"].fillna(0)
        axes.errorbar(
            ordered["x"], ordered["score"], spreads, capsize=2, elinewidth=1, **style
        )
        label = option_label(ordered.iloc[0], drawn, varied)
        last = ordered.iloc[-1]
        canvas.name_line(axes, last["x"], last["score"], label, style["color"])
    draw_majority(axes, part)
    canvas.tick_at(axes, sorted(drawn["x"].unique().astype(float).tolist()))
    return shown | set(drawn["method"])


def _draw_reference(
    axes: Axes, part: pd.DataFrame, method: str, drawn: pd.DataFrame
) -> bool:
    """Draw a line and a band at the method's best setting; return whether it exists.

    Args:
        axes: the panel.
        part: all rows of the workload.
        method: the reference method.
        drawn: the rows of the lines.
    """
    rows = part[(part["method"] == method) & part["score"].notna()]
    blocks = drawn["reversible_blocks"].unique()
    alike = rows["reversible_blocks"].isna() | rows["reversible_blocks"].isin(blocks)
    if not alike.any():
        return False
    best: pd.Series[Any] = rows[alike].sort_values("score").iloc[-1]
    its, score, spread = look(method), best["score"], best["score_spread"]
    axes.axhline(score, color=its.color, linestyle=its.line, linewidth=1)
    if not is_null(spread):
        axes.axhspan(
            score - spread, score + spread, color=its.color, alpha=0.12, linewidth=0
        )
    return True
