"""Common part of two figures: lists of a cell over its neurons, one line each."""

from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.plots import canvas
from meft_reports.summary import PROVENANCE, WORKLOAD, mean_list, prepare, split

Entries = dict[tuple[str, int], Line2D]


def entries_by_size(rows: pd.DataFrame) -> Entries:
    """Return the style of every method and number of neurons in `rows`."""
    names = zip(rows["method"], rows["num_neurons"], strict=True)
    return canvas.shaded_entries(
        {(method, int(count)): f"{count:,} neurons" for method, count in names}
    )


def draw_lists(
    frame: pd.DataFrame,
    column: str,
    has_list: Callable[[str], bool],
    across: Callable[[int], list[float]],
    labels: tuple[str, str],
    **style: Any,
) -> Figure:
    """Draw one panel per workload, one line per method and number of neurons.

    Args:
        frame: rows of `read_frame`.
        column: column of lists, averaged over the cells of a line entry by entry.
        has_list: whether a method fills the column.
        across: positions of the entries on the x axis, given the length of a list.
        labels: labels of the x axis and of the y axis.
        style: options of lines, in addition to the style of their method.

    Raises:
        NothingToDraw: no such cell ended well.
    """
    rows = prepare(frame)
    declared = rows[rows["method"].map(has_list)]
    if declared.empty:
        raise NothingDeclared(f"no cell has a method that fills `{column}`")
    seen = declared[declared[column].notna()]
    if seen.empty:
        raise NothingToDraw(f"no ok cell has a list in `{column}`")
    parts = [part for _, part in split(seen, [*WORKLOAD, *PROVENANCE])]
    shown = fields_to_show(seen, always=("task", "backbone", "dtype", "batch_size"))
    entries = entries_by_size(seen)
    figure, grid = canvas.panels(len(parts), num_columns=2)
    for axes, part in zip(grid, parts, strict=True):
        for (method, count), entry in entries.items():
            line = part[(part["method"] == method) & (part["num_neurons"] == count)]
            if not line.empty:
                mean = mean_list(line[column])
                look = canvas.style_of(entry) | style
                axes.plot(across(len(mean)), mean, **look)
        canvas.set_title(axes, describe(part, shown))
        axes.set_ylim(0, 1)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
    canvas.add_legend(figure, [], list(entries.values()))
    return figure
