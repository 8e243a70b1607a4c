"""Sorted activations of neurons: how few do most of the work."""

import pandas as pd
from matplotlib.figure import Figure

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.methods import has_neurons
from meft_reports.plots import canvas
from meft_reports.summary import PROVENANCE, WORKLOAD, prepare, split

TITLE = "How unequally neurons are used"
CAPTION = (
    "Mean activation of each neuron over the tokens of a full batch, after "
    "training, averaged over blocks; neurons by size, as shares of the largest. A "
    "steep curve is a sparse one (figure 2 of Hao et al., ACL 2024)."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """One panel per workload, one line per method and number of neurons.

    Raises:
        NothingToDraw: no such cell ended well.
    """
    rows = prepare(frame)
    declared = rows[rows["method"].map(has_neurons)]
    if declared.empty:
        raise NothingDeclared("no cell has adapters of many neurons")
    seen = declared[declared["activation_curve"].notna()]
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
            lists = line["activation_curve"].tolist()
            mean = [sum(values) / len(values) for values in zip(*lists, strict=True)]
            across = [i / (len(mean) - 1) for i in range(len(mean))]
            axes.plot(across, mean, **canvas.style_of(entry) | {"marker": ""})
        canvas.set_title(axes, describe(part, shown))
        axes.set_ylim(0, 1)
        axes.set_xlabel("neurons by size (share of all)")
        axes.set_ylabel("activation (largest = 1)")
    canvas.add_legend(figure, [], list(entries.values()))
    return figure
