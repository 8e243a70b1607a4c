"""Step time of adapters of many neurons relative to a reference, by number of neurons.

Steps of both alternate in the same process, as in `step_ratio`.
"""

import pandas as pd
from matplotlib.figure import Figure

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.methods import has_neurons
from meft_reports.plots import canvas
from meft_reports.plots.ratio_curves import draw_ratios, reference_entry
from meft_reports.style import method_order
from meft_reports.summary import PROVENANCE, WORKLOAD, prepare, split

TITLE = "Time of a step, relative to a reference method's of as many neurons"
CAPTION = (
    "One forward, backward and optimizer update, divided by one of the reference "
    "method, timed interleaved in the same process: the median over the pairs, with a "
    "bar as long as the distance between the quartiles. Below 1 (dotted) is faster "
    "than the reference."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per workload, accumulation window and reference method.

    The x axis is the number of neurons.

    Raises:
        NothingToDraw: no such cell ended well.
    """
    rows = prepare(frame)
    declared = rows[(rows["reference"] != "") & rows["method"].map(has_neurons)]
    if declared.empty:
        raise NothingDeclared(
            "no adapters of many neurons were declared with a `reference`"
        )
    timed = declared[(declared["status"] == "ok") & declared["step_ratio"].notna()]
    if timed.empty:
        raise NothingToDraw("no ok cell was timed alternately with its reference")
    place = [*WORKLOAD, *PROVENANCE, "accumulation", "reference"]
    parts = [part for _, part in split(timed, place)]
    shown = fields_to_show(timed, always=("task", "backbone", "dtype", "batch_size"))
    figure, grid = canvas.panels(len(parts), num_columns=2)
    for axes, part in zip(grid, parts, strict=True):
        methods = sorted(part["method"].unique(), key=method_order)
        lines = [
            (part[part["method"] == method], canvas.line_style(method, rank + 2))
            for rank, method in enumerate(methods)
        ]
        draw_ratios(axes, part, "num_neurons", lines)
        canvas.set_title(
            axes, f"{describe(part, shown)} · against {part['reference'].iloc[0]}"
        )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("neurons per block")
    dotted = reference_entry("the reference")
    canvas.add_legend(figure, set(timed["method"]), [dotted])
    return figure
