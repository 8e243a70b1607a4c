"""The figures of the page: one kind per file, each a `Figure` called `FIGURE`.

A figure is data, which `figure` defines: the rows that it needs, what it says about
itself, and a specification of Vega-Lite in which words that begin with `@` are filled
in by the page, from the rows that the reader chose. Add a kind by adding a file and its
name below.
"""

from meft_reports.page.figures import (
    blocks,
    curves,
    differences,
    kinds,
    longest,
    losses,
    matrix,
    memory,
    predictions,
    published,
    scores,
    step_ratios,
    timeline,
    traffic,
)

FIGURES = (
    longest.FIGURE,
    scores.FIGURE,
    differences.FIGURE,
    memory.FIGURE,
    kinds.FIGURE,
    timeline.FIGURE,
    curves.FIGURE,
    matrix.FIGURE,
    traffic.FIGURE,
    step_ratios.FIGURE,
    blocks.FIGURE,
    predictions.FIGURE,
    published.FIGURE,
    losses.FIGURE,
)
"""Every figure, in the order of the page."""
