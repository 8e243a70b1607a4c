"""All data of the page: cells, settings, paired differences, figures, breakdowns."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from meft_reports.breakdown import Breakdown
from meft_reports.columns import COLUMNS, SCHEMA_VERSION
from meft_reports.format import format_bytes
from meft_reports.page.caveats import Caveat
from meft_reports.page.cells import Cell, columns_of
from meft_reports.page.figures import FIGURES
from meft_reports.page.looks import looks_of
from meft_reports.page.opening import compared_with, opening_workload
from meft_reports.page.pairs import PairedDifference
from meft_reports.page.payload import encode, encode_columns
from meft_reports.page.predictions import prediction_errors
from meft_reports.page.score_answers import front_of
from meft_reports.page.searches import Search, rows_of
from meft_reports.page.settings import NUMBERS, Setting
from meft_reports.page.timeline import Timeline
from meft_reports.page.workloads import FIELDS
from meft_reports.published import Number

MOST_ROWS = 20
"""Number of rows of a breakdown, the largest, that the page shows."""


def data_of(
    frame: pd.DataFrame,
    cells: Sequence[Cell],
    settings: Sequence[Setting],
    pairs: Sequence[PairedDifference],
    caveats: Sequence[Caveat],
    breakdowns: Mapping[str, Breakdown],
    timelines: Sequence[Timeline],
    published: Sequence[Number],
    searches: Sequence[Search],
) -> dict[str, Any]:
    """Return the data of the page, ready for JSON.

    Args:
        frame: the frame.
        cells: its cells.
        settings: the settings that they make.
        pairs: the paired differences between these.
        caveats: what to keep in mind, with positions in `cells`.
        breakdowns: what the peak of a cell consists of, by `cell_id`.
        timelines: memory over one step of some methods.
        published: numbers that others measured, with predictions.
        searches: answers of `fit`.
    """
    fronts = _fronts(settings)
    workloads = {s.workload.index: s.workload for s in settings}
    columns = [c for c in COLUMNS if not c.versioned]
    return {
        "schema_version": SCHEMA_VERSION,
        "cells": encode_columns(columns_of(frame, [c.name for c in columns])),
        "columns": {
            column.name: [column.section, column.unit, column.dtype, column.meaning]
            for column in columns
        },
        "workloads": [
            {"title": workloads[index].title, **workloads[index].fields}
            for index in sorted(workloads)
        ],
        "fields": FIELDS,
        "settings": encode(
            [
                {
                    **setting.to_json(),
                    "cells": [cell["index"] for cell in setting.cells],
                    "is_front": fronts.get(id(setting)),
                    "order": _order(setting),
                    "text": memory_text(setting),
                }
                for setting in settings
            ]
        ),
        "options": sorted(settings[0].options) if settings else [],
        "numbers": NUMBERS,
        # Without an interval there is nothing to draw.
        "pairs": encode([p.to_json() for p in pairs if p.interval.low is not None]),
        "breakdowns": _breakdowns(cells, breakdowns),
        "predictions": encode([e.to_json() for e in prediction_errors(settings)]),
        "timelines": [timeline.to_json() for timeline in timelines],
        "searches": encode(rows_of(searches)),
        "published": encode([_published(number) for number in published]),
        "looks": looks_of(cell["method"] for cell in cells),
        "figures": [dataclasses.asdict(figure) for figure in FIGURES],
        "caveats": [caveat.cells for caveat in caveats],
        "opening": opening_workload(settings),
        "against": compared_with(settings),
    }


def _published(number: Number) -> dict[str, Any]:
    return {
        "source": number.source,
        "device": number.device,
        "case": number.case,
        "quantity": number.quantity,
        "measured": number.measured,
        "predicted": number.predicted,
        "note": number.note,
        "is_calibration": number.is_calibration,
        "error": 100 * number.error,
    }


def _fronts(settings: Sequence[Setting]) -> dict[int, bool]:
    by_workload: dict[int, list[Setting]] = {}
    for setting in settings:
        row = setting.to_json()
        if row["is_trained"]:
            by_workload.setdefault(setting.workload.index, []).append(setting)
    return {id(s): True for its in by_workload.values() for s in front_of(its)}


def _order(setting: Setting) -> float:
    """Return the place of a setting among bars: by peak, what did not fit last."""
    peak = setting.numbers["peak_allocated_bytes"]
    return peak if peak is not None else 2.0**60 + (setting.least_bytes or 2**59)


def memory_text(setting: Setting) -> str:
    """Return the peak of a setting in words, `more than ...` if it did not fit."""
    peak = setting.numbers["peak_allocated_bytes"]
    if peak is not None:
        return format_bytes(peak)
    if setting.status != "oom":
        return setting.status
    size = setting.least_bytes
    return f"more than {format_bytes(size)}" if size else "out of memory"


def _breakdowns(
    cells: Sequence[Cell], breakdowns: Mapping[str, Breakdown]
) -> dict[str, Any]:
    """Return the breakdowns, each once, and which of them every cell has."""
    found = [breakdowns.get(cell["cell_id"]) for cell in cells]
    places: dict[Breakdown, int] = {}
    of = [None if one is None else places.setdefault(one, len(places)) for one in found]
    return {
        "of": of,
        "kept": [
            {
                "phase": its.phase,
                "peak": its.peak_bytes,
                "kinds": _by_kind(its),
                "rows": its.rows[:MOST_ROWS],
                "saved": its.saved_rows[:MOST_ROWS],
            }
            for its in places
        ],
    }


def _by_kind(breakdown: Breakdown) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for row in breakdown.rows:
        sums[row.kind] += row.num_bytes
    if breakdown.other_bytes:
        sums["smaller storages"] = breakdown.other_bytes
    return dict(sums)
