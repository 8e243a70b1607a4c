"""Largest gradient error against depth, for methods that rebuild activations.

Every block that is inverted in floating point adds a rounding error, which a scale
magnifies; the exact inverse has an error of exactly zero at any depth.
"""

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.methods import is_meft, is_stored
from meft_reports.plots import canvas
from meft_reports.style import method_order
from meft_reports.summary import PROVENANCE, WORKLOAD, prepare, split, worst

TITLE = "Gradient error against depth"
CAPTION = (
    "Relative error of a block's gradients against the stored twin, the same function "
    "under ordinary autograd: one line per method, the worst over its blocks, settings "
    "and seeds. At 1 (dotted) nothing of the gradient is left. Lower is better. An "
    "exact zero stands on the lower edge as a triangle, a value that is not finite on "
    "the upper edge as a star, a cell that failed as a cross."
)
DECADES = (1e-8, 1e1)
"""Range of the y axis of a panel in which no error can be shown."""


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per workload in which rebuilding methods have two depths.

    Raises:
        NothingToDraw: there is none, or no ok cell of it reported gradient errors.
    """
    rows = prepare(frame)
    rebuilds = rows["method"].map(is_meft) & ~rows["method"].map(is_stored)
    rows = rows[rebuilds.astype(bool) & rows["num_blocks"].notna()]
    fixed = [name for name in (*WORKLOAD, *PROVENANCE) if name != "depth"]
    parts = [p for _, p in split(rows, fixed) if p["num_blocks"].nunique() > 1]
    if not parts:
        raise NothingDeclared("no rebuilding method was declared at two depths")
    parts = [part for part in parts if _known(part).any()]
    if not parts:
        raise NothingToDraw("no ok cell of two depths reported a gradient error")
    drawn = pd.concat(parts)
    shown = fields_to_show(drawn, always=("task", "backbone", "dtype"))
    shown = [name for name in shown if name in fixed]
    figure, grid = canvas.panels(len(parts), num_columns=2)
    for axes, part in zip(grid, parts, strict=True):
        _draw_panel(axes, part)
        canvas.set_title(axes, describe(part, shown))
        axes.set_xlabel("depth (blocks)")
        axes.set_ylabel("worst gradient error (relative)")
    failed = [canvas.failed_entry()] if (drawn["status"] != "ok").any() else []
    canvas.add_legend(figure, drawn["method"], failed)
    return figure


def _known(part: pd.DataFrame) -> "pd.Series[bool]":
    return part["gradient_error"].notna() & (part["status"] == "ok")


def _draw_panel(axes: Axes, part: pd.DataFrame) -> None:
    canvas.log_up(axes)
    axes.axhline(1, color="#888888", linestyle=":", linewidth=1)
    known = part[_known(part)]
    on_scale = False
    for method in sorted(known["method"].unique(), key=method_order):
        same = known[known["method"] == method]
        style = canvas.line_style(method)
        errors = {
            int(key["num_blocks"]): worst(cells["gradient_error"]) or 0.0
            for key, cells in split(same, ["num_blocks"])
        }
        regular = {n: e for n, e in errors.items() if math.isfinite(e) and e > 0}
        axes.plot(list(regular), list(regular.values()), **style)
        on_scale |= bool(regular)
        for num_blocks in errors.keys() - regular.keys():
            finite = math.isfinite(errors[num_blocks])
            canvas.mark_off_scale(axes, num_blocks, finite, style["color"])
    if not on_scale:
        axes.set_ylim(*DECADES)
    canvas.tick_at(axes, sorted(part["num_blocks"].unique().tolist()))
    failed = part[part["status"] != "ok"]
    # The edge itself is for stars.
    canvas.mark_failed(axes, failed, "num_blocks", top=0.91)
