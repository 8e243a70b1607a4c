"""Memory over one step by kind, with the peak marked."""

from meft_reports.page.figures.figure import LEGEND, Figure, css, quantity, tooltip

_X = quantity("time", "operator of the step", axis={"tickCount": 5})

FIGURE = Figure(
    name="timeline",
    title="Memory over one step, by kind",
    about="Predicted, from files of moments; each part of the step is shown by its "
    "moment of most memory. The line marks the peak; the band below is the phase.",
    rows="timeline",
    scaled={"size": "bytes", "top": "peak_bytes"},
    value="peak_bytes",
    is_wide=True,
    spec={
        "facet": {
            "field": "method",
            "type": "nominal",
            "title": None,
            "sort": "@panels",
            "header": {"labelFontSize": 12, "labelFontWeight": "bold"},
        },
        "columns": "@columns",
        "spec": {
            "width": "@panel_width",
            "height": "@panel_height",
            "layer": [
                {
                    "mark": {"type": "area", "interpolate": "step-after"},
                    "encoding": {
                        "x": _X,
                        "y": quantity("size", "@unit", stack="zero"),
                        "order": {"field": "kind_order"},
                        "color": {
                            "field": "kind",
                            "type": "nominal",
                            "scale": {"domain": "@kinds", "range": "@kind_colors"},
                            "legend": {**LEGEND, "title": "kind"},
                        },
                        "tooltip": tooltip(
                            method="method", kind="kind", peak_text="peak"
                        ),
                    },
                },
                {
                    "transform": [{"filter": "datum.is_peak"}],
                    "mark": {"type": "rule", "color": css("fg")},
                    "encoding": {"x": _X},
                },
                {
                    "transform": [{"filter": "datum.is_peak && datum.kind_order == 0"}],
                    "mark": {"type": "text", "align": "left", "dx": 4, "dy": -6},
                    "encoding": {
                        "x": _X,
                        "y": quantity("top", "@unit"),
                        "text": {"field": "peak_text"},
                    },
                },
                {
                    "needs": "phase_end",
                    "transform": [{"filter": "isValid(datum.phase_end)"}],
                    "mark": {"type": "rect", "height": 6, "opacity": 0.9},
                    "encoding": {
                        "x": quantity("phase_start", "operator of the step"),
                        "x2": {"field": "phase_end"},
                        "y": {"value": "@phase_top"},
                        "y2": {"value": "@panel_height"},
                        "stroke": {"value": css("bg")},
                        "fill": {
                            "field": "phase",
                            "type": "nominal",
                            "title": None,
                            "scale": {"domain": "@phases", "range": "@phase_colors"},
                            "legend": {**LEGEND, "title": "phase"},
                        },
                        "tooltip": tooltip(phase="phase"),
                    },
                },
            ],
        },
    },
)
