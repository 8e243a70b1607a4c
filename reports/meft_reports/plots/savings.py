"""Activations of a step by workload: the exact inverse against the plain alternatives.

There is one row per workload, one marker per method, and one panel per device. The
numbers are those of the table `savings`.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.plots import canvas
from meft_reports.summary import PROVENANCE, WORKLOAD, split
from meft_reports.tables.activations import BASES, EXACT, workloads
from meft_reports.text import short

TITLE = "Activations by workload"
CAPTION = (
    "What the peak of a training step needs beyond weights and optimizer state, with "
    f"{EXACT} and with the alternatives; gradients are among it. One row per workload "
    "on random input of exact shape. Further to the left is better. A cross is a cell "
    "that failed."
)
PLACE = ["device", "machine", "torch_version", "num_threads"]
"""Fields that a panel's rows agree in."""
METHODS = (*BASES, EXACT)
GIB = 2**30
ROW_INCHES = 0.19
LABEL_LENGTH = 100
"""Number of characters of a row's name."""


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per device, one row per workload.

    Raises:
        NothingDeclared: no two workloads have the exact inverse and another method.
        NothingToDraw: the exact inverse ended well in none of them.
    """
    found = [part for _, part in workloads(frame) if (part["method"] == EXACT).any()]
    if len(found) < 2:
        raise NothingDeclared(f"no two workloads were declared with {EXACT} and others")
    drawn = pd.concat(found)
    if not _is_known(drawn[drawn["method"] == EXACT]).any():
        raise NothingToDraw(f"no ok cell of {EXACT} has a peak")
    shown = fields_to_show(drawn, always=("backbone", "dtype", "device"))
    named = _fields_of_rows(drawn, shown)
    panels = [(part, _rows(part)) for _, part in split(drawn, PLACE)]
    heights = [1.3 + ROW_INCHES * len(rows) for _, rows in panels]
    figure, grid = canvas.panels(len(panels), 1, heights)
    for axes, (part, rows) in zip(grid, panels, strict=True):
        _draw_panel(axes, rows, named)
        title = describe(part, [n for n in shown if n in PLACE])
        # A part per line: the panel is narrow, and the legend stands next to it.
        axes.set_title(title.replace(" · ", "\n"))
    failed = drawn[drawn["method"].isin(METHODS)]["status"].ne("ok").any()
    entries = [canvas.failed_entry()] if failed else []
    methods = [method for method in METHODS if (drawn["method"] == method).any()]
    canvas.add_legend(figure, methods, entries)
    return figure


def _is_known(cells: pd.DataFrame) -> "pd.Series[bool]":
    return (cells["status"] == "ok") & cells["peak_activation_bytes"].notna()


def _rows(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the cells of each workload, from one place."""
    return [row for _, row in split(frame, [*WORKLOAD, *PROVENANCE])]


def _fields_of_rows(drawn: pd.DataFrame, shown: list[str]) -> list[str]:
    """Return those of the fields `shown` that the rows of a panel are named after.

    They are those of the workload; code and number of slots only if rows would
    otherwise have equal names.
    """
    named = [n for n in shown if n in WORKLOAD and n not in ("task", "device")]
    if len(_rows(drawn)) > len(list(split(drawn, [*PLACE, *named]))):
        named += [n for n in shown if n in PROVENANCE and n not in PLACE]
    return named


def _draw_panel(axes: Axes, rows: list[pd.DataFrame], named: list[str]) -> None:
    for place, row in enumerate(rows):
        _draw_row(axes, row, place)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.1)  # room for crosses
    axes.set_yticks(range(len(rows)), [_label(row, named) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("activations of a step (GiB)")


def _draw_row(axes: Axes, row: pd.DataFrame, place: int) -> None:
    """Draw the markers of one workload, and a cross at the right for what failed."""
    num_failed = 0
    for method in METHODS:
        cells = row[row["method"] == method]
        known = cells[_is_known(cells)]
        style = canvas.line_style(method) | {"linestyle": "", "markersize": 6}
        if len(known):
            mean = known["peak_activation_bytes"].mean() / GIB
            axes.plot([mean], [place], **style)
        elif len(cells):
            style |= {"marker": "x", "transform": axes.get_yaxis_transform()}
            axes.plot([0.985 - 0.025 * num_failed], [place], **style)
            num_failed += 1


def _label(row: pd.DataFrame, named: list[str]) -> str:
    # The panel's title says where weights are random, and that numbers are predicted.
    label = describe(row.assign(random_weights=False, device=""), named)
    return short(label.replace("random:", "", 1), max_length=LABEL_LENGTH)
