"""Common part of `memory_batch` and `memory_depth`: memory of a step along one axis.

There are two panels per workload, bytes saved for backward and peak allocated, with one
line per method. The cells are those on random input, whose shapes are exact. A cell
that failed is a cross at the upper edge, at its position on the x axis.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.format import MIB
from meft_reports.labels import describe, fields_to_show
from meft_reports.plots import canvas
from meft_reports.summary import (
    PROVENANCE,
    WORKLOAD,
    on_random_input,
    prepare,
    settings,
    split,
    summarise,
)

QUANTITIES = {
    "saved_bytes": "saved for backward (MiB)",
    "peak_allocated_bytes": "peak allocated memory (MiB)",
}
# A panel is logarithmic if its values span more than this factor, or the positions
# where they were measured more than `LOG_RATIO_ACROSS`.
LOG_RATIO_UP = 50


def draw_along(frame: pd.DataFrame, field: str, x_column: str, label: str) -> Figure:
    """Draw memory along the workload's `field`.

    Args:
        frame: rows of `read_frame`.
        field: a field of the workload.
        x_column: column with the actual value of `field` in the model.
        label: label of the x axis.

    Raises:
        NothingToDraw: no workload was measured at two values of `field`.
    """
    rows = prepare(frame)
    rows = rows[on_random_input(rows)]
    fixed = [name for name in (*WORKLOAD, *PROVENANCE) if name != field]
    parts = [p for _, p in split(rows, fixed) if p[x_column].nunique() > 1]
    if not parts:
        raise NothingDeclared(
            f"no workload on random input was declared at two values of `{x_column}`"
        )
    parts = [part for part in parts if _measured(part).any()]
    if not parts:
        raise NothingToDraw(f"no ok cell of two values of `{x_column}` has a peak")
    drawn = pd.concat(parts)
    shown = fields_to_show(drawn, always=("task", "backbone", "dtype"))
    shown = [n for n in shown if n != field]
    shown = shown + [n for n in ("batch_size", "seq_len") if n not in (field, *shown)]
    entries = canvas.entries_by_k(drawn)
    figure, grid = canvas.panels(len(parts) * len(QUANTITIES), len(QUANTITIES))
    for index, part in enumerate(parts):
        for offset, (quantity, words) in enumerate(QUANTITIES.items()):
            axes = grid[index * len(QUANTITIES) + offset]
            _draw_panel(axes, part, x_column, quantity, entries)
            canvas.set_title(axes, describe(part, shown))
            axes.set_xlabel(label)
            axes.set_ylabel(words)
    failed = [canvas.failed_entry()] if (drawn["status"] != "ok").any() else []
    canvas.add_legend(figure, [], [*entries.values(), *failed])
    return figure


def _measured(part: pd.DataFrame) -> "pd.Series[bool]":
    return (part["status"] == "ok") & part["peak_allocated_bytes"].notna()


def _draw_panel(
    axes: Axes,
    part: pd.DataFrame,
    x_column: str,
    quantity: str,
    entries: dict[tuple[str, int], Line2D],
) -> None:
    means = summarise(part, ["num_blocks", quantity]).dropna(subset=[quantity])
    for rank, line in enumerate(settings(means, ignoring=("reference",))):
        ordered = line.sort_values(x_column)
        method, k = line["method"].iloc[0], line["lost_bits"].fillna(-1).iloc[0]
        style = canvas.line_style(method, rank)
        style |= canvas.style_of(entries[method, int(k)])
        axes.plot(ordered[x_column], ordered[quantity] / MIB, **style)
    _scale(axes, sorted(part[x_column].dropna().unique()), means[quantity])
    failed = part[(part["status"] != "ok") & part[x_column].notna()]
    canvas.mark_failed(axes, failed, x_column)


def _scale(axes: Axes, positions: list[int], values: "pd.Series[float]") -> None:
    """Make both axes linear or both logarithmic: linear growth is a straight line."""
    wide = positions[-1] >= canvas.LOG_RATIO_ACROSS * positions[0]
    if len(values):
        wide |= values.max() > LOG_RATIO_UP * values.min()
    positive = positions[0] > 0 and bool((values > 0).all())
    if wide and positive:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xticks(positions, [str(position) for position in positions])
    axes.minorticks_off()
