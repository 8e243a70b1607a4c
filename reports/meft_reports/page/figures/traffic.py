"""Bytes between host and device in one step, by direction and phase."""

from meft_reports.page.figures.figure import Figure, css, names, quantity, tooltip

FIGURE = Figure(
    name="traffic",
    title="Bytes between host and device in one step",
    about="Counted by the ledger, all blocks together. The tick is what the paper's "
    "accounting gives for the same batches, the cross what an offloaded dense adapter "
    "of as many neurons would transfer, both directions together.",
    rows="traffic",
    scaled={"size": "bytes", "paper": "paper_bytes", "dense": "dense_bytes"},
    value="total",
    is_wide=True,
    spec={
        "width": "@width_beside_names",
        "height": {"step": 20},
        "layer": [
            {
                "mark": {"type": "bar", "cursor": "pointer"},
                "encoding": {
                    "y": names(),
                    "x": quantity("size", "@unit", stack=True),
                    "order": {"field": "part_order"},
                    "color": {
                        "field": "part",
                        "type": "nominal",
                        "scale": {"domain": "@parts", "range": "@part_colors"},
                        "legend": {
                            "title": None,
                            "orient": "bottom",
                            "columns": "@legend_columns",
                        },
                    },
                    "tooltip": tooltip(
                        name="setting",
                        part="direction and phase",
                        size="@unit|.3f",
                        paper="the paper's accounting, @unit|.3f",
                        dense="dense offload, @unit|.3f",
                    ),
                },
            },
            {
                "needs": "paper",
                "transform": [{"filter": "isValid(datum.paper)"}],
                "mark": {"type": "tick", "thickness": 2, "color": css("fg")},
                "encoding": {"y": names(), "x": quantity("paper", "@unit")},
            },
            {
                "needs": "dense",
                "transform": [{"filter": "isValid(datum.dense)"}],
                "mark": {"type": "point", "shape": "cross", "color": css("fg")},
                "encoding": {"y": names(), "x": quantity("dense", "@unit")},
            },
        ],
    },
)
