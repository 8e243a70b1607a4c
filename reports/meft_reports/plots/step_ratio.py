"""Step time relative to a reference method, whose steps alternate in the same process.

Both run on the same machine at the same time, so the ratio is comparable where seconds
of two processes are not.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.methods import has_neurons
from meft_reports.plots import canvas
from meft_reports.plots.ratio_curves import draw_ratios, reference_entry
from meft_reports.summary import PROVENANCE, WORKLOAD, prepare, split

TITLE = "Time of a step, relative to a reference method's"
CAPTION = (
    "One forward, backward and optimizer update, divided by one of the reference "
    "method, timed interleaved in the same process: the median over the pairs, with a "
    "bar as long as the distance between the quartiles. One line per method and k, "
    "side by side where they share a depth. Below 1 (dotted) is faster than the "
    "reference."
)
PLACE = [name for name in (*WORKLOAD, *PROVENANCE) if name != "depth"]


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per workload and reference method; the x axis is the depth.

    Raises:
        NothingToDraw: no cell was timed interleaved with a reference, or none ended
            well.
    """
    rows = prepare(frame)
    rows = rows[(rows["reference"] != "") & rows["num_blocks"].notna()]
    rows = rows[~rows["method"].map(has_neurons).astype(bool)]
    if rows.empty:
        raise NothingDeclared("no cell was declared with a `reference` method")
    timed = (rows["status"] == "ok") & rows["step_ratio"].notna()
    parts = [
        part
        for _, part in split(rows, [*PLACE, "reference"])
        if timed[part.index].any()
    ]
    if not parts:
        raise NothingToDraw("no ok cell was timed alternately with its reference")
    drawn = pd.concat(parts)
    shown = fields_to_show(drawn, always=("backbone", "dtype"))
    shown = [name for name in shown if name in PLACE]
    several = drawn["reference"].nunique() > 1
    figure, grid = canvas.panels(len(parts), num_columns=2)
    entries = canvas.entries_by_k(drawn[timed[drawn.index]])
    for axes, part in zip(grid, parts, strict=True):
        _draw_panel(axes, part, entries)
        reference = f" · against {part['reference'].iloc[0]}" if several else ""
        canvas.set_title(axes, describe(part, shown) + reference)
        axes.set_xlabel("depth (blocks)")
    references = ", ".join(sorted(drawn["reference"].unique()))
    dotted = reference_entry(references)
    failed = [canvas.failed_entry()] if (drawn["status"] != "ok").any() else []
    canvas.add_legend(figure, [], [*entries.values(), dotted, *failed])
    return figure


def _draw_panel(
    axes: Axes, part: pd.DataFrame, entries: dict[tuple[str, int], Line2D]
) -> None:
    timed = part[(part["status"] == "ok") & part["step_ratio"].notna()]
    own_k = timed["lost_bits"].fillna(-1)
    lines = [
        (timed[(timed["method"] == method) & (own_k == k)], canvas.style_of(entry))
        for (method, k), entry in entries.items()
    ]
    lines = [(line, style) for line, style in lines if len(line)]
    draw_ratios(axes, part, "num_blocks", lines)
    canvas.mark_failed(axes, part[part["status"] != "ok"], "num_blocks")
