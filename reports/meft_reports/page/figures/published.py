"""Predictions of memory that others measured, against what they published."""

from meft_reports.page.figures.figure import LEGEND, Figure, css, quantity, tooltip

_X = "error of the prediction (%)"
_KINDS = ["predicted", "an assumption was fitted to it"]

FIGURE = Figure(
    name="published",
    title="Memory that others measured, as predicted here",
    about="One point per number that others published, by who measured it. Right of 0 "
    "the prediction is too high. Numbers to which an assumption was fitted are hollow, "
    "and no evidence.",
    rows="published",
    value="error",
    spec={
        "width": "@width_beside_names",
        "height": {"step": 24},
        "layer": [
            {
                "mark": {"type": "rule", "color": css("soft")},
                "encoding": {"x": {"datum": 0, "type": "quantitative"}},
            },
            {
                "mark": {"type": "point", "size": 45, "strokeWidth": 1.5},
                "encoding": {
                    "x": quantity("error", _X),
                    "y": {
                        "field": "name",
                        "type": "nominal",
                        "title": None,
                        "axis": {"labelLimit": "@label_width"},
                    },
                    "shape": {
                        "field": "kind",
                        "type": "nominal",
                        "scale": {"domain": _KINDS, "range": ["circle", "diamond"]},
                        "legend": LEGEND,
                    },
                    "fill": {
                        "field": "kind",
                        "type": "nominal",
                        "scale": {
                            "domain": _KINDS,
                            "range": [css("good"), "transparent"],
                        },
                        "legend": LEGEND,
                    },
                    "stroke": {
                        "field": "kind",
                        "type": "nominal",
                        "scale": {"domain": _KINDS, "range": [css("good"), css("bad")]},
                        "legend": LEGEND,
                    },
                    "tooltip": tooltip(
                        case="run",
                        device="GPU",
                        quantity="number",
                        measured_text="published",
                        predicted_text="predicted",
                        error="error, %|+.2f",
                        note="note",
                    ),
                },
            },
        ],
    },
)
