"""Errors of predicted peaks against those of the GPU itself."""

from meft_reports.page.figures.figure import Figure, css, methods, quantity, tooltip

_X = "error of the prediction (%)"

FIGURE = Figure(
    name="predictions",
    title="Predictions against the GPU itself",
    about="The same cells on a GPU and on its virtual twin, one point per setting of "
    "all workloads. Right of 0 the prediction is too high.",
    rows="predictions",
    value="error",
    spec={
        "width": "@width_beside_names",
        "height": {"step": 60},
        "encoding": {
            "y": {
                "field": "quantity",
                "type": "nominal",
                "title": None,
                "axis": {"labelLimit": "@label_width"},
            },
        },
        "layer": [
            {
                "mark": {"type": "rule", "color": css("soft")},
                "encoding": {
                    "x": {"datum": 0, "type": "quantitative"},
                    "y": {"value": 0},
                    "y2": {"value": "height"},
                },
            },
            {
                "mark": {
                    "type": "point",
                    "filled": True,
                    "size": 45,
                    "opacity": 0.8,
                    "cursor": "pointer",
                },
                "encoding": {
                    "x": quantity("error", _X),
                    "yOffset": {"field": "offset", "type": "quantitative"},
                    **methods(),
                    "tooltip": tooltip(
                        name="setting",
                        workload="workload",
                        measured_text="measured",
                        predicted_text="predicted",
                        error="error, %|+.3f",
                    ),
                },
            },
        ],
    },
)
