"""Deviation from the backbone at the start against k, due to the scales only.

It is measured before the first step, so it does not depend on training.
"""

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from meft_reports.deviation_at_start import PLACE, start_deviations
from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.methods import is_exact
from meft_reports.plots import canvas
from meft_reports.summary import prepare, split

TITLE = "Deviation from the backbone at the start"
CAPTION = (
    "Relative deviation of the last hidden state from the backbone's, before training "
    "and without dropout, against the k of the exact methods' scale 2^-k. One line per "
    "variant and depth, the mean over seeds; a horizontal line is the same variant "
    "with the paper's scales. Lower is nearer to the backbone. An exact zero stands on "
    "the lower edge as a triangle."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per backbone and workload in which k takes two values.

    Raises:
        NothingToDraw: there is none, or no ok cell of it reported a deviation.
    """
    declared = prepare(frame)
    if not any(_is_curve(part) for _, part in split(declared, PLACE)):
        raise NothingDeclared("no exact method was declared at two values of k")
    rows = start_deviations(frame)
    parts = [part for _, part in split(rows, PLACE) if _is_curve(part)]
    if not parts:
        raise NothingToDraw("no ok cells of two values of k reported a deviation")
    drawn = pd.concat(parts)
    shown = fields_to_show(drawn, always=("backbone", "dtype"))
    shown = [name for name in shown if name in PLACE]
    figure, grid = canvas.panels(len(parts), num_columns=2)
    lines = zip(drawn["method"], drawn["num_blocks"], strict=True)
    entries = canvas.shaded_entries({(m, int(n)): f"{n} blocks" for m, n in lines})
    for axes, part in zip(grid, parts, strict=True):
        _draw_panel(axes, part, entries)
        canvas.set_title(axes, describe(part, shown))
        axes.set_xlabel("lost bits k (the scale is 2^-k)")
        axes.set_ylabel("deviation at the start (relative)")
    canvas.add_legend(figure, [], list(entries.values()))
    return figure


def _is_curve(part: pd.DataFrame) -> bool:
    return bool(part["lost_bits"].nunique() > 1)


def _draw_panel(
    axes: Axes, part: pd.DataFrame, entries: dict[tuple[str, int], Line2D]
) -> None:
    canvas.log_up(axes)
    for key, line in split(part, ["method", "num_blocks"]):
        style = canvas.style_of(entries[key["method"], int(key["num_blocks"])])
        if is_exact(key["method"]):
            _draw_curve(axes, line.sort_values("lost_bits"), style)
        else:
            its = {name: style[name] for name in ("color", "linestyle")}
            axes.axhline(line["start_deviation"].iloc[0], linewidth=1, **its)
    canvas.tick_at(axes, sorted(part["lost_bits"].dropna().unique().tolist()))


def _draw_curve(axes: Axes, line: pd.DataFrame, style: dict[str, Any]) -> None:
    points = list(zip(line["lost_bits"], line["start_deviation"], strict=True))
    regular = [(k, deviation) for k, deviation in points if deviation > 0]
    axes.plot([k for k, _ in regular], [d for _, d in regular], **style)
    for k, deviation in points:
        if not deviation > 0:
            canvas.mark_off_scale(axes, k, math.isfinite(deviation), style["color"])
