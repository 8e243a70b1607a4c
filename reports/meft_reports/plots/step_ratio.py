"""Time of a step by that of the rival, whose steps took turns in the same process.

Taking turns, both meet the same machine in the same minute, so the ratio says what
seconds of two processes cannot.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.labels import describe, fields_to_show
from meft_reports.plots import canvas
from meft_reports.style import method_order
from meft_reports.summary import PROVENANCE, WORKLOAD, prepare, split

TITLE = "Time of a step, relative to a rival's"
CAPTION = (
    "One forward, backward and optimizer update, divided by one of the rival that took "
    "turns with it in the same process: the median over the turns, with a bar as long "
    "as the distance between the quartiles. One line per method and k, side by side "
    "where they share a depth. Below 1 (dotted) is faster than the rival."
)
PLACE = [name for name in (*WORKLOAD, *PROVENANCE) if name != "depth"]


@canvas.styled
def draw(frame: pd.DataFrame) -> Figure:
    """One panel per workload and rival, depth across.

    Raises:
        NothingToDraw: no cell was timed in turn with a rival, or none ended well.
    """
    rows = prepare(frame)
    rows = rows[(rows["rival"] != "") & rows["num_blocks"].notna()]
    if rows.empty:
        raise NothingDeclared("no cell was declared with a `rival` to take turns with")
    timed = (rows["status"] == "ok") & rows["step_ratio"].notna()
    parts = [
        part for _, part in split(rows, [*PLACE, "rival"]) if timed[part.index].any()
    ]
    if not parts:
        raise NothingToDraw("no ok cell was timed in turn with its rival")
    drawn = pd.concat(parts)
    shown = fields_to_show(drawn, always=("backbone", "dtype"))
    shown = [name for name in shown if name in PLACE]
    figure, grid = canvas.panels(len(parts), num_columns=2)
    entries = _entries(drawn[timed[drawn.index]])
    for axes, part in zip(grid, parts, strict=True):
        _draw_panel(axes, part, entries)
        axes.set_title(describe(part, shown))
        axes.set_xlabel("depth (blocks)")
        axes.set_ylabel(f"time of a step ({part['rival'].iloc[0]} = 1)")
    failed = drawn["status"] != "ok"
    canvas.add_legend(
        figure,
        [],
        [*entries.values(), *([canvas.failed_entry()] if failed.any() else [])],
    )
    return figure


def _entries(timed: pd.DataFrame) -> dict[tuple[str, int], Line2D]:
    """The legend's entry, which is the look, of every method and k (-1 for no k)."""
    entries = {}
    for method in sorted(timed["method"].unique(), key=method_order):
        every_k = timed.loc[timed["method"] == method, "lost_bits"].fillna(-1)
        ordered = sorted(every_k.unique().tolist())
        style = canvas.line_style(method)
        for k, shade in zip(
            ordered, canvas.shades(style["color"], len(ordered)), strict=True
        ):
            its = style | {"color": shade}
            if style["markerfacecolor"] != "white":
                its |= {"markerfacecolor": shade}
            name = method if len(ordered) == 1 else f"{method}, k = {k}"
            entries[method, k] = Line2D([], [], label=name, **its)
    return entries


def _draw_panel(
    axes: Axes, part: pd.DataFrame, entries: dict[tuple[str, int], Line2D]
) -> None:
    axes.axhline(1, color="#888888", linestyle=":", linewidth=1)
    positions = sorted(part["num_blocks"].unique().tolist())
    canvas.tick_at(axes, positions)
    timed = part[(part["status"] == "ok") & part["step_ratio"].notna()]
    lines = [
        (
            entry,
            timed[(timed["method"] == method) & (timed["lost_bits"].fillna(-1) == k)],
        )
        for (method, k), entry in entries.items()
    ]
    lines = [(entry, line) for entry, line in lines if len(line)]
    low, high = axes.get_xlim()
    for rank, (entry, line) in enumerate(lines):
        # Side by side, so that no bar hides another; in the measure of the scale.
        share = 0.006 * (rank - (len(lines) - 1) / 2)
        means = line.groupby("num_blocks")[["step_ratio", "step_ratio_iqr"]].mean()
        across = [
            n * (high / low) ** share
            if axes.get_xscale() == "log"
            else n + (high - low) * share
            for n in means.index
        ]
        axes.errorbar(
            across,
            means["step_ratio"],
            means["step_ratio_iqr"].fillna(0) / 2,
            capsize=2,
            elinewidth=1,
            color=entry.get_color(),
            marker=entry.get_marker(),
            linestyle=entry.get_linestyle(),
            markerfacecolor=entry.get_markerfacecolor(),
        )
    canvas.mark_failed(axes, part[part["status"] != "ok"], "num_blocks")
