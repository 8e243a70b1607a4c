"""Deviation at the start against k: what the scales alone change of the backbone.

Measured before the first step, so that training has no part in it.
"""

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.methods import in_floats, is_exact
from meft_reports.plots import canvas
from meft_reports.start import PLACE, start_deviations
from meft_reports.style import look, method_order
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
    """One panel per backbone and workload in which k takes two values.

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
    for axes, part in zip(grid, parts, strict=True):
        _draw_panel(axes, part)
        axes.set_title(describe(part, shown))
        axes.set_xlabel("lost bits k (the scale is 2^-k)")
        axes.set_ylabel("deviation at the start (relative)")
    canvas.add_legend(figure, drawn["method"])
    return figure


def _is_curve(part: pd.DataFrame) -> bool:
    return bool(part["lost_bits"].nunique() > 1)


def _draw_panel(axes: Axes, part: pd.DataFrame) -> None:
    axes.set_yscale("log")
    lines = sorted(
        (method_order(key["method"]), key["num_blocks"], line)
        for key, line in split(part, ["method", "num_blocks"])
    )
    several = part["num_blocks"].nunique() > 1
    exact = part[part["method"].map(is_exact).astype(bool)]
    variants = {in_floats(method) for method in exact["method"]}
    ticks = sorted(exact["lost_bits"].unique().tolist())
    canvas.tick_at(axes, ticks)
    for (_, method), num_blocks, line in lines:
        words = f"{num_blocks} blocks" if several else ""
        if is_exact(method):
            _draw_curve(axes, line.sort_values("lost_bits"), words)
        elif method in variants:
            deviation, its = line["start_deviation"].iloc[0], look(method)
            axes.axhline(deviation, color=its.color, linestyle=its.line, linewidth=1)
            canvas.name_line(axes, ticks[-1], deviation, words, its.color)


def _draw_curve(axes: Axes, line: pd.DataFrame, words: str) -> None:
    style = canvas.line_style(line["method"].iloc[0])
    points = list(zip(line["lost_bits"], line["start_deviation"], strict=True))
    regular = [(k, deviation) for k, deviation in points if deviation > 0]
    axes.plot([k for k, _ in regular], [d for _, d in regular], **style)
    if regular:
        canvas.name_line(axes, *regular[-1], words, style["color"])
    for k, deviation in points:
        if not deviation > 0:
            canvas.mark_off_scale(axes, k, math.isfinite(deviation), style["color"])
