"""One self-contained HTML page with all figures, tables and styles.

The page states what was run and shows it; every number comes from the frame. The same
frame gives the same bytes, so a page can be committed and compared.
"""

import base64
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from meft_reports.columns import COLUMNS
from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.format import format_seconds
from meft_reports.plots import find_plot
from meft_reports.plots.canvas import render
from meft_reports.style import look, method_order
from meft_reports.summary import has_random_weights, on_random_input
from meft_reports.tables import find_tables
from meft_reports.tables.table import to_html
from meft_reports.valid_records import STATUSES


@dataclass(frozen=True, kw_only=True, slots=True)
class PageFigure:
    """A plot on the page, or the reason why there is none."""

    name: str
    title: str
    caption: str
    alt: str = ""
    data_uri: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading, figures, and tables; `folded` tables open on demand."""

    anchor: str
    title: str
    lead: str
    figures: tuple[PageFigure, ...] = ()
    tables: tuple[Markup, ...] = ()
    folded: tuple[tuple[str, Markup], ...] = ()
    empty: str = ""
    """Text that is shown if there is no table."""


def render_page(frame: pd.DataFrame) -> bytes:
    """Return the page of the records in `frame`, as UTF-8."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    source = resources.files("meft_reports").joinpath("templates/page.html.j2")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    page = template.render(
        title=" and ".join(_names(frame["sweep"])),
        facts=_facts(frame),
        counts=[(s, int((frame["status"] == s).sum())) for s in STATUSES],
        methods=_methods(frame),
        random_weights=bool(has_random_weights(frame).any()),
        predictions=sorted(frame["prediction"].dropna().unique()),
        sections=_sections(frame),
        columns=COLUMNS,
        versions=_names(frame["torch_version"]),
        machines=_names(frame["machine"]),
        commits=_commits(frame),
    )
    return page.encode()


def _sections(frame: pd.DataFrame) -> list[Section]:
    """Return the sections that have content, or a text for the case of no content."""
    sections = _all_sections(frame)
    return [s for s in sections if s.figures or s.tables or s.folded or s.empty]


def _all_sections(frame: pd.DataFrame) -> list[Section]:
    return [
        Section(
            anchor="results",
            title="Score, memory and time",
            lead="Fine-tuning on labelled text: what each method reached and took.",
            figures=_figures(
                frame,
                "score_memory",
                "step_seconds",
                "loss_curve",
                "score_lost_bits",
                "score_reversible",
                "score_top_k",
                "score_experts",
            ),
            tables=_tables(frame, "results"),
            folded=_folded(frame, "differences"),
            empty="No cell ran on a real task.",
        ),
        Section(
            anchor="memory",
            title="Memory along batch size and depth",
            lead="Single training steps on random input, whose shapes are exact.",
            figures=_figures(
                frame, "headline", "memory_batch", "memory_depth", "savings"
            ),
            tables=_tables(frame, "headline", "predictions", "savings"),
            folded=_folded(frame, "activations", "memory"),
            empty="No cell ran on random input.",
        ),
        Section(
            anchor="ratios",
            title="Against checkpointed adapters",
            lead="MEFT and the plain alternative: bottleneck adapters, one "
            "checkpoint per block, everything else computed twice.",
            figures=_figures(frame, "step_ratio"),
            folded=_folded(frame, "ratios"),
        ),
        Section(
            anchor="traffic",
            title="Rows between host and device",
            lead="Sparse adapters keep their neurons in host memory and move what a "
            "batch activates.",
            figures=_figures(
                frame,
                "step_neurons",
                "traffic_neurons",
                "union_batch",
                "routing_recall",
                "activation_curve",
            ),
            tables=_tables(frame, "traffic"),
        ),
        Section(
            anchor="exactness",
            title="Exactness of the rebuilt backward",
            lead="A reversible stack rebuilds its activations instead of storing them; "
            "this is how far the rebuilt ones and their gradients are off.",
            figures=_figures(frame, "reconstruction", "gradient_depth"),
            tables=_tables(frame, "twins"),
            folded=_folded(frame, "exactness"),
            empty="No cell reported errors.",
        ),
        Section(
            anchor="start",
            title="Deviation at the start",
            lead="What MEFT's scales alone change of the backbone's function, before "
            "the first step.",
            figures=_figures(frame, "start_deviation"),
            folded=_folded(frame, "start"),
        ),
        Section(
            anchor="failures",
            title="Cells that failed",
            lead="Running out of memory or time is a result too: every cell that did "
            "not end well, and why.",
            tables=_tables(frame, "failures"),
            empty="Every cell ended well.",
        ),
        Section(
            anchor="origin",
            title="Where the numbers come from",
            lead="Weights, data, code, packages and machine behind every number above.",
            tables=_tables(frame, "origins", "environment"),
        ),
    ]


def _figures(frame: pd.DataFrame, *names: str) -> tuple[PageFigure, ...]:
    figures = (_figure(frame, name) for name in names)
    return tuple(figure for figure in figures if figure is not None)


def _figure(frame: pd.DataFrame, name: str) -> PageFigure | None:
    """Return a figure; None if no cell of the run is of the kind it shows."""
    plot = find_plot(name)
    try:
        drawn = plot.draw(frame)
    except NothingDeclared:
        return None
    except NothingToDraw as reason:
        return PageFigure(
            name=name, title=plot.TITLE, caption=plot.CAPTION, reason=str(reason)
        )
    panels = [axes.get_title(loc="left").replace("\n", " · ") for axes in drawn.axes]
    # An image has its own namespace for the SVG's ids, and an alternative text.
    svg = base64.b64encode(render(drawn, "svg")).decode()
    return PageFigure(
        name=name,
        title=plot.TITLE,
        caption=plot.CAPTION,
        alt=f"{plot.TITLE}. Panels: {'; '.join(dict.fromkeys(panels))}. "
        "The same numbers stand in the tables of this section.",
        data_uri=f"data:image/svg+xml;base64,{svg}",
    )


def _tables(frame: pd.DataFrame, *names: str) -> tuple[Markup, ...]:
    return tuple(markup for _, markup in _folded(frame, *names))


def _folded(frame: pd.DataFrame, *names: str) -> tuple[tuple[str, Markup], ...]:
    tables = [table for name in names for table in find_tables(name)(frame)]
    # to_html escapes every value.
    return tuple((table.title, Markup(to_html(table))) for table in tables)


def _facts(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the summary at the top: counts and names."""
    tasks = _names(frame.loc[~on_random_input(frame), "task"])
    threads = ", ".join(_names(frame["num_threads"]))
    return [
        ("Tasks", ", ".join(tasks) or "none, shapes only"),
        ("Backbones", ", ".join(_names(frame["backbone"]))),
        ("Compute dtypes", ", ".join(_names(frame["dtype"]))),
        ("Seeds", ", ".join(_names(frame["seed"]))),
        ("Machine", "; ".join(_names(frame["machine"]))),
        ("Threads per cell", threads),
        ("Time spent in cells", format_seconds(frame["wall_seconds"].sum())),
        ("First cell started", str(frame["started_at"].min())),
        ("Last cell started", str(frame["started_at"].max())),
    ]


def _methods(frame: pd.DataFrame) -> list[dict[str, Any]]:
    methods = sorted(frame["method"].unique(), key=method_order)
    counts = frame["method"].value_counts()
    return [
        {"name": m, "color": look(m).color, "num_cells": int(counts[m])}
        for m in methods
    ]


def _commits(frame: pd.DataFrame) -> list[str]:
    pairs = frame[["commit", "dirty"]].drop_duplicates().dropna(subset=["commit"])
    names = {
        f"{commit[:12]}{' with changes' if dirty is True else ''}"
        for commit, dirty in pairs.itertuples(index=False)
    }
    return sorted(names)


def _names(values: "pd.Series[Any]") -> list[str]:
    return [str(value) for value in sorted(values.dropna().unique())]
