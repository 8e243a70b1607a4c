"""Bytes between host and device in one step, against the number of neurons.

Measured bytes and the two formulas they are compared with are on one scale.
"""

from typing import Literal

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.methods import is_sparse
from meft_reports.plots import canvas
from meft_reports.style import method_order
from meft_reports.summary import PROVENANCE, WORKLOAD, prepare, split

TITLE = "Bytes between host and device"
CAPTION = (
    "Both directions, all blocks, one optimizer step, counted copy by copy. Grey: what "
    "the paper's accounting gives for the same batches (dashed), and what an offloaded "
    "dense adapter would move (dotted); both are formulas. Lower is better."
)
FORMULAS: dict[str, tuple[str, Literal["--", ":"]]] = {
    "paper_transfer_bytes": ("the paper's accounting", "--"),
    "dense_transfer_bytes": ("dense offload", ":"),
}
_MIB = 2**20


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per workload and accumulation window.

    The x axis is the number of neurons.

    Raises:
        NothingToDraw: no cell with sparse adapters ended well.
    """
    rows = prepare(frame)
    declared = rows[rows["method"].map(is_sparse)]
    if declared.empty:
        raise NothingDeclared("no cell has sparse adapters")
    moved = declared[declared["transfer_bytes"].notna()]
    if moved.empty:
        raise NothingToDraw("no ok cell moved rows of sparse adapters")
    place = [*WORKLOAD, *PROVENANCE, "accumulation"]
    parts = [part for _, part in split(moved, place)]
    shown = fields_to_show(moved, always=("task", "backbone", "dtype", "batch_size"))
    figure, grid = canvas.panels(len(parts), num_columns=2)
    for axes, part in zip(grid, parts, strict=True):
        for rank, method in enumerate(
            sorted(part["method"].unique(), key=method_order)
        ):
            line = part[part["method"] == method].groupby("num_neurons")
            means = line["transfer_bytes"].mean() / _MIB
            axes.plot(means.index, means, **canvas.line_style(method, rank + 2))
        for name, (_, style) in FORMULAS.items():
            means = part.groupby("num_neurons")[name].mean() / _MIB
            # With a marker, because a single number of neurons has no visible line.
            axes.plot(means.index, means, color="#888888", linestyle=style, marker="_")
        steps = int(part["accumulation"].iloc[0])
        batches = f" · {steps} batches a step" if steps > 1 else ""
        canvas.set_title(axes, describe(part, shown) + batches)
        canvas.tick_at(axes, sorted(part["num_neurons"].unique().tolist()))
        canvas.log_up(axes)
        axes.set_xlabel("neurons per block")
        axes.set_ylabel("moved in a step (MiB)")
    formulas = [
        Line2D([], [], label=label, color="#888888", linestyle=style)
        for label, style in FORMULAS.values()
    ]
    canvas.add_legend(figure, set(moved["method"]), formulas)
    return figure
