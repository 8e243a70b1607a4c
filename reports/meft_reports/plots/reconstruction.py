"""Reconstruction and gradient error per block: how exact the rebuilt backward is.

The backward of a reversible stack starts at the highest block and rebuilds downwards,
so errors grow towards the lowest block. A gradient error of 1 means that the error is
as large as the gradient.
"""

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.methods import is_meft, is_stored
from meft_reports.plots import canvas
from meft_reports.summary import (
    PROVENANCE,
    WORKLOAD,
    prepare,
    settings,
    split,
)

TITLE = "Reconstruction and gradient error per block"
CAPTION = (
    "Left: relative error of each block's rebuilt input. Right: relative error of each "
    "block's gradients against the stored twin, the same function under ordinary "
    "autograd; at 1 (dotted) nothing of the gradient is left. One line per method: the "
    "mean over its seeds, with a band from the least to the greatest. The backward "
    "runs from the highest block down to block 1. Lower is better. An exact zero "
    "stands on the lower edge as a triangle, a value that is not finite on the upper "
    "edge as a star. Of several depths of a workload the greatest is drawn."
)
QUANTITIES = {
    "reconstruction_error": "reconstruction error (relative)",
    "gradient_error": "gradient error (relative)",
}


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw two panels per workload in which a method reported errors.

    Raises:
        NothingToDraw: no ok cell reported errors.
    """
    rows = prepare(frame)
    if not (rows["method"].map(is_meft) & ~rows["method"].map(is_stored)).any():
        raise NothingDeclared("no method that rebuilds was declared")
    has_error = rows[list(QUANTITIES)].notna().any(axis=1) & (rows["status"] == "ok")
    if not has_error.any():
        raise NothingToDraw("no ok cell reported a reconstruction or gradient error")
    methods = rows.loc[has_error, "method"].unique()
    parts = [
        part[part["method"].isin(methods)]
        for _, part in split(rows, [*WORKLOAD, *PROVENANCE])
        if has_error[part.index].any()
    ]
    parts = _deepest(parts)
    drawn = pd.concat(parts)
    shown = fields_to_show(drawn, always=("task", "backbone", "dtype"))
    figure, grid = canvas.panels(len(parts) * len(QUANTITIES), len(QUANTITIES))
    for index, part in enumerate(parts):
        for offset, (quantity, words) in enumerate(QUANTITIES.items()):
            axes = grid[index * len(QUANTITIES) + offset]
            _draw_panel(axes, part[part["status"] == "ok"], quantity)
            canvas.set_title(axes, describe(part, shown))
            axes.set_xlabel("block (0 is the lowest)")
            axes.set_ylabel(words)
    canvas.add_legend(figure, drawn["method"])
    canvas.add_note(figure, canvas.failures_note(drawn[drawn["status"] != "ok"]))
    return figure


def _deepest(parts: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Return the part with the most blocks among parts that differ in depth only."""
    fixed = [name for name in (*WORKLOAD, *PROVENANCE) if name != "depth"]
    kept: dict[tuple[str, ...], pd.DataFrame] = {}
    for part in parts:
        key = tuple(str(part[name].iloc[0]) for name in fixed)
        deepest = kept.setdefault(key, part)
        if part["num_blocks"].max() > deepest["num_blocks"].max():
            kept[key] = part
    return list(kept.values())


def _draw_panel(axes: Axes, part: pd.DataFrame, quantity: str) -> None:
    canvas.log_up(axes)
    if quantity == "gradient_error":
        axes.axhline(1, color="#888888", linestyle=":", linewidth=1)
    curves = [
        (same["method"].iloc[0], list(same[quantity].dropna()))
        for same in settings(part, ignoring=("reference",))
    ]
    for rank, (method, seeds) in enumerate(curves):
        _draw_curve(axes, canvas.line_style(method, rank), seeds)
    num_blocks = max((len(seed) for _, seeds in curves for seed in seeds), default=1)
    axes.set_xlim(-0.5, num_blocks - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_curve(axes: Axes, style: dict[str, Any], seeds: list[list[float]]) -> None:
    # Numbered from 0, as in `span` and in the library's warnings.
    blocks = range(max(map(len, seeds), default=0))
    points = {b: [seed[b] for seed in seeds if len(seed) > b] for b in blocks}
    regular = {
        b: values
        for b, values in points.items()
        if all(math.isfinite(v) and v > 0 for v in values)
    }
    means = [sum(values) / len(values) for values in regular.values()]
    axes.plot(list(regular), means, **style)
    axes.fill_between(
        list(regular),
        [min(values) for values in regular.values()],
        [max(values) for values in regular.values()],
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )
    for block in points.keys() - regular.keys():
        finite = all(map(math.isfinite, points[block]))
        canvas.mark_off_scale(axes, block, finite, style["color"])
