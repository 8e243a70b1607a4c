"""Training loss of every cell."""

from meft_reports.page.figures.figure import (
    Figure,
    dashes,
    methods,
    quantity,
    tooltip,
)

FIGURE = Figure(
    name="losses",
    title="Training loss",
    about="One line per cell, so one per seed; long runs show every n-th step.",
    rows="losses",
    value="last",
    spec={
        "width": "@width",
        "height": "@panel_height",
        "mark": {
            "type": "line",
            "strokeWidth": 1.2,
            "opacity": 0.8,
            "cursor": "pointer",
        },
        "encoding": {
            "x": quantity("x", "step", axis={"tickMinStep": 1, "format": "d"}),
            "y": quantity("y", "loss", scale={"zero": False}),
            "detail": {"field": "line"},
            "color": methods()["color"],
            "strokeDash": dashes(),
            "tooltip": tooltip(line="cell", x="step", y="loss|.4f"),
        },
    },
)
