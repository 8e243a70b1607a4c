"""Share of neurons that a batch activates, against its number of tokens.

Figure 8 of Hao et al. (ACL 2024): the union over tokens is transferred.
"""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.methods import is_sparse
from meft_reports.plots import canvas
from meft_reports.plots.neuron_lists import entries_by_size
from meft_reports.summary import PROVENANCE, WORKLOAD, mean_list, prepare, split

TITLE = "Neurons that a batch activates"
CAPTION = (
    "Share of a block's neurons that answer some token of a batch: the mean over "
    "blocks and batches, with a bar from the least to the most of a block. One line "
    "per method and number of neurons."
)


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per workload; the x axis is the number of tokens of a batch.

    Raises:
        NothingToDraw: no cell with sparse adapters ended well.
    """
    rows = prepare(frame)
    declared = rows[rows["method"].map(is_sparse)]
    if declared.empty:
        raise NothingDeclared("no cell has sparse adapters")
    seen = declared[declared["union_fraction"].notna()].copy()
    if seen.empty:
        raise NothingToDraw("no ok cell said which neurons were active")
    seen["tokens"] = seen["batch_size"] * seen["seq_len"]
    place = [n for n in (*WORKLOAD, *PROVENANCE) if n not in ("batch_size", "seq_len")]
    parts = [part for _, part in split(seen, place)]
    shown = fields_to_show(seen, always=("task", "backbone", "dtype"))
    shown = [name for name in shown if name in place]
    entries = entries_by_size(seen)
    figure, grid = canvas.panels(len(parts), num_columns=2)
    for axes, part in zip(grid, parts, strict=True):
        for (method, count), entry in entries.items():
            line = part[(part["method"] == method) & (part["num_neurons"] == count)]
            points = sorted(
                (key["tokens"], _mean(cells["union_fraction"]))
                for key, cells in split(line, ["tokens"])
            )
            if points:
                means = [mean for _, (mean, _, _) in points]
                below = [mean - low for _, (mean, low, _) in points]
                above = [high - mean for _, (mean, _, high) in points]
                axes.errorbar(
                    [tokens for tokens, _ in points],
                    means,
                    [below, above],
                    capsize=2,
                    elinewidth=1,
                    **canvas.style_of(entry),
                )
        canvas.set_title(axes, describe(part, shown))
        canvas.tick_at(axes, sorted(part["tokens"].unique().tolist()))
        axes.set_ylim(0, 1)
        axes.set_xlabel("tokens of a batch")
        axes.set_ylabel("share of neurons active")
    canvas.add_legend(figure, [], list(entries.values()))
    return figure


def _mean(lists: "pd.Series[Any]") -> tuple[float, float, float]:
    """Return mean, minimum and maximum over blocks, averaged over cells per block."""
    blocks = mean_list(lists)
    return sum(blocks) / len(blocks), min(blocks), max(blocks)
