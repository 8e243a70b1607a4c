"""Recall of routed against exact top-k, block by block."""

import pandas as pd
from matplotlib.figure import Figure

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.methods import has_experts
from meft_reports.plots import canvas
from meft_reports.summary import PROVENANCE, WORKLOAD, prepare, split

TITLE = "Neurons that the router finds"
CAPTION = (
    "Of the neurons that a token would keep if every neuron were scored, the "
    "share that it keeps by way of its router: the mean over the tokens of a full "
    "batch, after training. 1 is what a router without error would reach."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """One panel per workload, one line per method and number of neurons.

    Raises:
        NothingToDraw: no such cell ended well.
    """
    rows = prepare(frame)
    declared = rows[rows["method"].map(has_experts)]
    if declared.empty:
        raise NothingDeclared("no cell has a router")
    seen = declared[declared["routing_recall"].notna()]
    if seen.empty:
        raise NothingToDraw("no ok cell looked at how its neurons are used")
    parts = [part for _, part in split(seen, [*WORKLOAD, *PROVENANCE])]
    shown = fields_to_show(seen, always=("task", "backbone", "dtype", "batch_size"))
    names = zip(seen["method"], seen["num_neurons"], strict=True)
    entries = canvas.shaded_entries(
        {(method, int(count)): f"{count:,} neurons" for method, count in names}
    )
    figure, grid = canvas.panels(len(parts), num_columns=2)
    for axes, part in zip(grid, parts, strict=True):
        for (method, count), entry in entries.items():
            line = part[(part["method"] == method) & (part["num_neurons"] == count)]
            if line.empty:
                continue
            lists = line["routing_recall"].tolist()
            mean = [sum(values) / len(values) for values in zip(*lists, strict=True)]
            across = list(range(len(mean)))
            axes.plot(across, mean, **canvas.style_of(entry))
        canvas.set_title(axes, describe(part, shown))
        axes.set_ylim(0, 1)
        axes.set_xlabel("block (0 is the lowest)")
        axes.set_ylabel("recall of the best neurons")
    canvas.add_legend(figure, [], list(entries.values()))
    return figure
