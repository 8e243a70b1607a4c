"""Bytes at the peak of a step by kind of memory."""

from meft_reports.page.figures.figure import Figure, names, quantity, tooltip

FIGURE = Figure(
    name="kinds",
    title="What is alive at the peak, by kind",
    about="Every storage that is alive when a step needs most memory. Open a bar for "
    "the modules and operators that it belongs to.",
    rows="kinds",
    scaled={"size": "bytes"},
    value="total",
    spec={
        "width": "@width_beside_names",
        "height": {"step": 20},
        "layer": [
            {
                "mark": {"type": "bar", "cursor": "pointer"},
                "encoding": {
                    "y": names(),
                    "x": quantity("size", "@unit", stack=True),
                    "order": {"field": "kind_order"},
                    "color": {
                        "field": "kind",
                        "type": "nominal",
                        "scale": {"domain": "@kinds", "range": "@kind_colors"},
                        "legend": {
                            "title": None,
                            "orient": "bottom",
                            "columns": "@legend_columns",
                        },
                    },
                    "tooltip": tooltip(
                        name="setting",
                        kind="kind",
                        size="@unit|.4f",
                        share="of the peak|.1%",
                        phase="the peak is in",
                    ),
                },
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 6},
                "encoding": {
                    "y": names(),
                    "x": quantity("size", "@unit", aggregate="sum"),
                    "text": {"field": "peak_text"},
                },
            },
        ],
    },
)
