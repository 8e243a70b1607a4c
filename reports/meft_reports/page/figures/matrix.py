"""Every workload and method as a heat map, against one method."""

from meft_reports.page.figures.figure import Figure, css, tooltip

STEPS = (-75, -50, -25, -2, 2, 25, 50)
"""Limits of the shades, in per cent more than the method compared with."""

FIGURE = Figure(
    name="matrix",
    title="Every workload: @y, compared with @against",
    about="Numbers are per cent less (−) or more (+); of a method's settings the one "  # noqa: RUF001
    'with the least counts. A cross did not fit, "fits" is shown where only the method '
    "compared with did not, and a dot where that one has no number.",
    rows="matrix",
    free=(
        *("backbone", "depth", "dtype", "weights_dtype", "batch_size", "seq_len"),
        *("attention", "blocks", "task", "place"),
    ),
    controls=("against", "y_bytes"),
    value="relative",
    is_wide=True,
    spec={
        "width": {"step": "@cell_width"},
        "height": {"step": 20},
        "encoding": {
            "x": {
                "field": "method",
                "type": "nominal",
                "sort": "@methods",
                "title": None,
                "axis": {"orient": "top", "labelAngle": -45, "labelLimit": 180},
            },
            "y": {
                "field": "workload",
                "type": "nominal",
                "title": None,
                "sort": None,
                "axis": {"labelLimit": "@label_width", "ticks": False},
            },
        },
        "layer": [
            {
                "mark": {"type": "rect", "cursor": "pointer", "stroke": css("bg")},
                "encoding": {
                    "color": {
                        "condition": [
                            {
                                "test": "datum.state == 'oom'",
                                "value": css("heat-oom"),
                            },
                            {
                                "test": "datum.state == 'fits'",
                                "value": css("heat-fits"),
                            },
                            {
                                "test": "!isValid(datum.relative)",
                                "value": css("heat4"),
                            },
                        ],
                        "field": "relative",
                        "type": "quantitative",
                        "scale": {
                            "type": "threshold",
                            "domain": list(STEPS),
                            "range": [css(f"heat{n}") for n in range(8)],
                        },
                        "legend": None,
                    },
                    "tooltip": tooltip(
                        workload="workload",
                        name="setting",
                        value_text="value",
                        relative_text="compared",
                    ),
                },
            },
            {
                "mark": {"type": "text", "fontSize": 10, "cursor": "pointer"},
                "encoding": {"text": {"field": "short"}},
            },
        ],
    },
)
