"""MEFT's methods against full fine-tuning, and the best rival at equal memory.

Each row is a setting of MEFT, with the setting of another method that scores best of
those that take no more memory, and the differences of scores on equal seeds with their
intervals.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from meft_reports.format import (
    NOTHING,
    format_bytes,
    format_difference,
    format_score,
)
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.rivals import MARGIN, has_equal_memory, is_held_against, is_rival
from meft_reports.summary import (
    PROVENANCE,
    WORKLOAD,
    learned,
    prepare,
    settings,
    split,
)
from meft_reports.tables.differences import (
    Difference,
    are_alike,
    difference,
    show_interval,
)
from meft_reports.tables.table import (
    METHOD,
    Heading,
    Table,
    join_options,
    notes_on,
    notes_on_scores,
)

FULL = "full"
PEAK = "peak allocated"
COLUMNS = (
    METHOD,
    Heading("score", "Score of the method, the mean over seeds."),
    Heading(PEAK, "Largest number of bytes allocated at a time, the mean over seeds."),
    Heading("less full", "Its score less that of full fine-tuning, on equal seeds."),
    Heading("interval", "Interval of 95 % of this difference."),
    Heading("best rival", "Best method of others that takes no more memory."),
    Heading("its score", "Score of the rival, the mean over seeds."),
    Heading("its peak", "Peak allocated memory of the rival, the mean over seeds."),
    Heading("less it", "Score of the method less that of the rival, on equal seeds."),
    Heading("its interval", "Interval of 95 % of this difference."),
)
NOTES = (
    f"The best rival is the one with the highest mean score of those that take at most "
    f"{MARGIN:g} times the memory; it is chosen by these scores, which favors it a "
    "little. Intervals of 95 % are over seeds and evaluated rows together, or over "
    "seeds where rows are not known. Where 0 lies in one, the difference is not "
    "significant.",
)
NEEDS = (
    "scores and peaks of a method of MEFT and of another method, with two seeds in "
    "common, on the same workload of a task other than synthetic and synthetic-lm"
)
"""What the records must hold for there to be a table."""


NOT_SO_LITTLE = "none takes so little"


class _Setting(NamedTuple):
    name: str
    method: str
    rows: pd.DataFrame
    score: float
    peak: float


def make(frame: pd.DataFrame) -> list[Table]:
    """Return one table per workload with a method of MEFT and a rival."""
    rows = learned(prepare(frame))
    is_scored = (rows["status"] == "ok") & rows["score"].notna()
    rows = rows[is_scored & rows["peak_allocated_bytes"].notna()]
    shown = fields_to_show(rows, always=("task", "backbone", "dtype"))
    tables = []
    for _, part in split(rows, [*WORKLOAD, *PROVENANCE]):
        every = [_setting(one, part) for one in settings(part)]
        own = [one for one in every if is_held_against(one.method)]
        found = [row for one in own if (row := _row(one, every)) is not None]
        if found:
            tables.append(
                Table(
                    title=f"At equal memory · {describe(part, shown)}",
                    columns=COLUMNS,
                    rows=tuple(found),
                    notes=(*NOTES, *notes_on(part), *notes_on_scores(part)),
                )
            )
    return tables


def _setting(rows: pd.DataFrame, part: pd.DataFrame) -> _Setting:
    first = rows.iloc[0]
    return _Setting(
        name=join_options(first["method"], option_label(first, part)),
        method=first["method"],
        rows=rows.set_index("seed"),
        score=float(rows["score"].mean()),
        peak=float(rows["peak_allocated_bytes"].mean()),
    )


def _row(one: _Setting, every: Sequence[_Setting]) -> tuple[str, ...] | None:
    known = [
        (other, found)
        for other in every
        if is_rival(other.method)
        and are_alike(one.rows.iloc[0], other.rows.iloc[0])
        and (found := difference(one.rows, other.rows)) is not None
    ]
    if not known:
        return None
    full = [found for other, found in known if other.method == FULL]
    equal = [pair for pair in known if has_equal_memory(pair[0].peak, one.peak)]
    best = max(equal, key=lambda pair: pair[0].score, default=None)
    nobody = (
        NOT_SO_LITTLE if any(other.method != FULL for other, _ in known) else NOTHING
    )
    return (
        one.name,
        format_score(one.score),
        format_bytes(one.peak),
        *_shown(full[0] if full else None),
        *(
            (nobody, NOTHING, NOTHING)
            if best is None
            else (best[0].name, format_score(best[0].score), format_bytes(best[0].peak))
        ),
        *_shown(None if best is None else best[1]),
    )


def _shown(found: Difference | None) -> tuple[str, str]:
    if found is None:
        return NOTHING, NOTHING
    interval = found.widest
    return format_difference(interval.mean), show_interval(interval)
