"""Compare a frame with a baseline, cell by cell: findings, and an exit code.

    0  fine              every compared number is within what is allowed
    1  regression        a number is worse by more, or a cell of the baseline did not
                         run with the newest code
    3  not comparable    two torch versions, devices or machines, or no number
    4  a cell failed     which is ok in the baseline

(The command line has other codes for errors.) Where several apply, the code is that of
the first of 4, 1, 3. Cells are joined by `cell_id`, which contains every field of a
cell. A number that is better by more than is allowed is reported and passes. For a
list, the worst entry is compared. Cells to which no threshold applies are named, and
where no number was compared at all, nothing passes.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any

import pandas as pd

from meft_reports import contaminated
from meft_reports.breakdown import Breakdown, what_grew
from meft_reports.columns import CELL_FIELDS, SCORE_NAMES
from meft_reports.columns.column import Column
from meft_reports.compared import Number, compared_number, exact, format_number
from meft_reports.conditions import FOR_HOST_MEMORY, HOST_MEMORY
from meft_reports.contaminated import is_contaminated
from meft_reports.errors import ReportError
from meft_reports.format import format_fact, format_value, is_null
from meft_reports.text import plural
from meft_reports.threshold import Threshold, thresholds_of


class Kind(StrEnum):
    """The kind of a finding."""

    FAILED = "failed"
    REGRESSION = "regression"
    MISSING = "missing"
    NOT_COMPARABLE = "not comparable"
    IMPROVED = "improved"
    NEW = "new"


# In the order in which they decide the exit code; the others pass.
EXIT_CODES = {
    Kind.FAILED: 4,
    Kind.REGRESSION: 1,
    Kind.MISSING: 1,
    Kind.NOT_COMPARABLE: 3,
}

SAME_FOR_ALL = ("torch_version", "device", "device_name")
SAME_FOR_SECONDS = (*SAME_FOR_ALL, "machine", "num_threads", "num_slots")
SAME_FOR_HOST_MEMORY = (*SAME_FOR_ALL, *FOR_HOST_MEMORY)
SAME_FOR_VALUES = (
    *SAME_FOR_ALL,
    "weights_sha256",
    "data_origin",
    "num_train_rows",
    "num_eval_rows",
)
RATIOS_OF_SECONDS = ("step_ratio", "step_ratio_iqr")
SAID = {
    "code_sha256": "code",
    "dirty": "uncommitted changes",
    "machine": "machine",
    "cpu": "processor",
    "platform": "platform",
    "num_threads": "threads per cell",
    "num_slots": "cells side by side",
    "prediction": "way of predicting",
    "loss_mean": "what losses are averaged over",
}
"""Facts that may differ between the run and the baseline and are then reported.

The version of every package is reported in addition.
"""
NUM_CHANGES = 5
"""Number of changes of memory that a finding lists."""
SAVED = "saved_bytes"
EXPLAINED = (SAVED, "peak_allocated_bytes", "peak_reserved_bytes")
"""Columns of memory that a breakdown explains."""
Breakdowns = Mapping[str, Breakdown]
"""What the peaks of cells consist of, by `cell_id`."""
MAX_NAMES = 5
"""Number of cells that a note names."""
MAX_PAIRS = 3
"""Number of differences of one fact that are reported in full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One difference between the run and the baseline."""

    kind: Kind
    cell_id: str
    column: str = ""
    """Empty if the finding concerns the whole cell."""
    expected: str
    got: str
    difference: str = ""
    allowed: str = ""
    advice: str = ""
    unit: str = ""
    before: Number | None = None
    """The compared number of the baseline; None if the finding has none."""
    after: Number | None = None
    """That of the run."""
    grew: tuple[str, ...] = ()
    """What of the memory grew, if both records say what their peaks consist of."""

    def __str__(self) -> str:
        """Return the finding as a few lines for a terminal."""
        facts = {
            "expected": self.expected,
            "got": self.got,
            "difference": self.difference,
            "allowed": self.allowed,
        }
        head = f"{self.kind}: {self.cell_id}" + (f" {self.column}" * bool(self.column))
        lines = [f"  {name:<10} {fact}" for name, fact in facts.items() if fact]
        title = "what grew" if self.kind == Kind.REGRESSION else "what fell"
        for number, line in enumerate(self.grew):
            lines.append(f"  {'' if number else title:<10} {line}")
        return "\n".join([head, *lines, *([f"  {self.advice}"] if self.advice else [])])


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A number of a cell that was compared with that of the baseline."""

    cell_id: str
    column: Column
    after: Number
    """The number of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """All findings, the worst first, and what was compared."""

    findings: tuple[Finding, ...]
    num_cells: int
    """Number of cells of the baseline."""
    compared: tuple[Compared, ...]
    unchecked: tuple[str, ...] = ()
    """Cells that are ok on both sides, and to which no threshold applies."""
    notes: tuple[str, ...] = ()
    """What decides nothing: cells that are not checked, and other differences."""

    @property
    def exit_code(self) -> int:
        """The exit code: 0, 1, 3 or 4, as defined by the module."""
        kinds = {finding.kind for finding in self.findings}
        return next((code for kind, code in EXIT_CODES.items() if kind in kinds), 0)

    @property
    def num_compared(self) -> int:
        """Number of compared numbers."""
        return len(self.compared)

    @property
    def summary(self) -> str:
        """The counts of findings by kind, in one line."""
        counts = [
            f"{sum(f.kind == kind for f in self.findings)} {kind}"
            for kind in Kind
            if any(f.kind == kind for f in self.findings)
        ]
        unchecked = f", {len(self.unchecked)} not checked" * bool(self.unchecked)
        return (
            f"{self.num_cells} cells in the baseline{unchecked}, {self.num_compared} "
            "numbers compared: "
            f"{', '.join(counts) or 'no difference beyond what is allowed'}"
        )

    def __str__(self) -> str:
        """Return every finding, other differences, and the summary."""
        return "\n".join([*map(str, self.findings), *self.notes, self.summary])


def check(
    frame: pd.DataFrame,
    baseline: pd.DataFrame,
    thresholds: Sequence[Threshold],
    breakdowns: tuple[Breakdowns, Breakdowns] = ({}, {}),
    num_changes: int = NUM_CHANGES,
) -> CheckResult:
    """Compare every ok cell of `baseline` with the cell of the same id in `frame`.

    Args:
        frame: result of `read_frame`: the record of each cell that counts.
        baseline: result of `read_baseline`, as a frame.
        thresholds: the compared columns, with the allowed difference in each. Of
            several for one column and cell, the last one holds.
        breakdowns: what the peaks of the baseline, and those of the run, consist of.
        num_changes: number of changes of memory that a finding lists.

    Returns:
        All findings.
    """
    expected_cells = baseline[baseline["status"] == "ok"].set_index("cell_id")
    known = [*baseline["cell_id"], *frame["cell_id"]]
    _refuse_idle(thresholds, [*map(str, known)])
    got_cells = frame.set_index("cell_id")
    findings: list[Finding] = []
    compared: list[Compared] = []
    unchecked: list[str] = []
    for cell_id, expected in expected_cells.iterrows():
        name = str(cell_id)
        if name not in got_cells.index:
            findings.append(_missing(name))
            continue
        got = got_cells.loc[name]
        whole = _whole_cell(name, expected, got)
        if whole is not None:
            findings.append(whole)
            continue
        its_thresholds = thresholds_of(name, thresholds)
        if not its_thresholds:
            unchecked.append(name)
        for threshold in its_thresholds.values():
            finding, number = _compare(name, threshold, expected, got)
            if finding is not None:
                pair = expected, got
                grew = _what_grew(finding, pair, breakdowns, num_changes)
                findings.append(dataclasses.replace(finding, grew=grew))
            if number is not None:
                column = threshold.column
                compared.append(Compared(cell_id=name, column=column, after=number))
    findings += _new(got_cells.index.difference(expected_cells.index), got_cells)
    decided = any(finding.kind in EXIT_CODES for finding in findings)
    if not compared and not decided:
        findings.append(_nothing_compared(unchecked))
    return CheckResult(
        findings=tuple(sorted(findings, key=_badness)),
        num_cells=len(expected_cells),
        compared=tuple(compared),
        unchecked=tuple(unchecked),
        notes=(
            *_note_unchecked(unchecked),
            *_notes(baseline, expected_cells, got_cells),
        ),
    )


def _refuse_idle(thresholds: Sequence[Threshold], cell_ids: Sequence[str]) -> None:
    """Raise for a threshold that applies to no cell, which would check nothing."""
    for threshold in thresholds:
        if not any(thresholds_of(name, [threshold]) for name in cell_ids):
            raise ReportError(
                f"--fail-on {threshold.column.short_name}:...@{threshold.pattern}: the "
                "pattern matches no cell of the baseline or the runs"
            )


def _badness(finding: Finding) -> tuple[int, float]:
    """Return a key by which the worst finding is the first."""
    before, after = finding.before, finding.after
    change = 0.0
    if before is not None and after is not None:
        known = math.isfinite(before) and math.isfinite(after)
        change = abs(after - before) / (abs(before) or 1) if known else math.inf
    return list(Kind).index(finding.kind), -change


def _what_grew(
    finding: Finding,
    cells: tuple[Any, Any],
    breakdowns: tuple[Breakdowns, Breakdowns],
    most: int,
) -> tuple[str, ...]:
    """Return what of the memory grew, in lines; none where that is not known."""
    before, after = (its.get(finding.cell_id) for its in breakdowns)
    if before is None or after is None or finding.column not in EXPLAINED:
        return ()
    if not most or finding.kind not in (Kind.REGRESSION, Kind.IMPROVED):
        return ()
    expected, got = (int(cell[finding.column]) for cell in cells)
    is_saved = finding.column == SAVED
    growth = what_grew(before, after, got - expected, is_saved=is_saved)
    return tuple(growth.lines(most))


def _whole_cell(cell_id: str, expected: Any, got: Any) -> Finding | None:
    """Return the finding of a cell none of whose numbers can be compared."""
    if got["status"] != "ok":
        return _failed(cell_id, got)
    if not got["newest_code"]:
        return _not_run_again(cell_id, got)
    for name in CELL_FIELDS:
        if not _equal(expected[name], got[name]):
            return Finding(
                kind=Kind.NOT_COMPARABLE,
                cell_id=cell_id,
                expected=_fact(name, expected[name]),
                got=_fact(name, got[name]),
                advice="two cells of one name; write the baseline again",
            )
    return None


def _compare(
    cell_id: str, threshold: Threshold, expected: Any, got: Any
) -> tuple[Finding | None, Number | None]:
    """Return the finding of one number of a cell, and the number if it is finite.

    It is None if the two could not be compared.
    """
    column = threshold.column
    reason = _why_not(column, expected, got)
    if reason is not None:
        return Finding(
            kind=Kind.NOT_COMPARABLE,
            cell_id=cell_id,
            column=column.name,
            expected=reason[0],
            got=reason[1],
            advice=reason[2],
        ), None
    before = compared_number(column, expected[column.name])
    after = compared_number(column, got[column.name])
    # `_why_not` has checked this.
    assert before is not None
    assert after is not None
    known = math.isfinite(before)
    allowed = threshold.allowed(exact(before)) if known else None
    difference = _difference(before, after)
    if difference is not None and allowed is not None and abs(difference) <= allowed:
        return None, after
    better = _is_better(column, before, after)
    texts = [format_number(column, number) for number in (before, after)]
    if texts[0] == texts[1]:
        texts = [repr(number) for number in (before, after)]
    return Finding(
        kind=Kind.IMPROVED if better else Kind.REGRESSION,
        cell_id=cell_id,
        column=column.name,
        expected=texts[0],
        got=texts[1],
        difference=_signed(column, difference, before),
        unit=column.unit,
        before=before,
        after=after,
        allowed="" if allowed is None else format_value(allowed, column.unit),
        advice="consider updating the baseline" if better else "",
    ), after if math.isfinite(after) else None


def _difference(before: Number, after: Number) -> Fraction | None:
    """Return `after - before` exactly; None if one of them is not finite."""
    if math.isfinite(before) and math.isfinite(after):
        return exact(after) - exact(before)
    return None


def _is_better(column: Column, before: Number, after: Number) -> bool:
    """Return whether `after` is better; a number that is not finite is worst."""
    if not math.isfinite(after):
        return False
    if not math.isfinite(before):
        return True
    if column.lower_is_better is None:
        return False
    return (after < before) == column.lower_is_better


def _signed(column: Column, difference: Fraction | None, before: Number) -> str:
    """Return a difference with its sign, and as a share of what was before."""
    if difference is None:
        return ""
    sign = "+" if difference > 0 else "-"
    text = sign + format_value(abs(difference), column.unit)
    if before and column.unit != "fraction":
        text += f", {float(100 * difference / exact(abs(before))):+.2f} %"
    return text


def _why_not(column: Column, expected: Any, got: Any) -> tuple[str, str, str] | None:
    """Return why two cells cannot be compared: both values, and advice."""
    for name in _must_match(column):
        before, after = expected[name], got[name]
        both_null = is_null(before) and is_null(after)
        # A torch version that is not recorded may be any version.
        if both_null and name != "torch_version":
            continue
        if both_null or not _equal(before, after):
            return _fact(name, before), _fact(name, after), _advice(name)
    metric = SCORE_NAMES.get(column.name)
    if metric is not None:
        before, after = expected[metric], got[metric]
        if is_null(before) and is_null(after):
            unknown = _fact(metric, before)
            return unknown, unknown, "a score of an unknown metric proves nothing"
        if not _equal(before, after):
            return _fact(metric, before), _fact(metric, after), "another metric"
    numbers = [compared_number(column, cell[column.name]) for cell in (expected, got)]
    before, after = (format_number(column, number) for number in numbers)
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        if column.is_shared and any(map(is_contaminated, (expected, got))):
            return before, after, contaminated.ADVICE
        return before, after, "a number that was not measured proves nothing"
    if all(map(math.isnan, known)):
        return before, after, "a number that is not finite proves nothing"
    if column.dtype == "list":
        lengths = [f"{len(cell[column.name])} entries" for cell in (expected, got)]
        if lengths[0] != lengths[1]:
            return lengths[0], lengths[1], "an entry that is missing proves nothing"
    return None


def _equal(before: Any, after: Any) -> bool:
    """Return whether two facts are equal; an unknown value equals only another one."""
    if is_null(before) or is_null(after):
        return is_null(before) and is_null(after)
    return bool(before == after)


def _must_match(column: Column) -> Iterable[str]:
    is_of_place = column.is_measured_time or column.is_shared
    if is_of_place or column.name in RATIOS_OF_SECONDS:
        return SAME_FOR_SECONDS
    if column.name == HOST_MEMORY:
        return SAME_FOR_HOST_MEMORY
    # The other columns of this unit depend on weights and rows, except for one.
    if column.unit == "fraction" and column.name != "trainable_fraction":
        return SAME_FOR_VALUES
    return SAME_FOR_ALL


def _fact(name: str, value: Any) -> str:
    return f"{name} {'unknown' if is_null(value) else value}"


def _advice(name: str) -> str:
    return (
        f"make a baseline with the same {name}, or run with that of the baseline; "
        "`meft-bench run SWEEP --force` runs what is done, too"
    )


def _missing(cell_id: str) -> Finding:
    return Finding(
        kind=Kind.MISSING,
        cell_id=cell_id,
        expected="an ok cell, as in the baseline",
        got="no such cell in the runs",
        advice="run the whole sweep, or update the baseline if the cell was removed",
    )


def _not_run_again(cell_id: str, got: Any) -> Finding:
    return Finding(
        kind=Kind.MISSING,
        cell_id=cell_id,
        expected="an ok cell with the newest code of the runs",
        got=f"an ok cell with older code, {got['code_sha256']:.8}, of "
        f"{got['started_at']}",
        advice="run the whole sweep with one code; `meft-bench run SWEEP --force` runs "
        "what is done, too",
    )


def _failed(cell_id: str, got: Any) -> Finding:
    return Finding(kind=Kind.FAILED, cell_id=cell_id, expected="ok", got=_ending(got))


def _new(cell_ids: Iterable[Any], cells: pd.DataFrame) -> list[Finding]:
    return [
        Finding(
            kind=Kind.NEW,
            cell_id=str(cell_id),
            expected="not in the baseline",
            got=_ending(cells.loc[cell_id]),
        )
        for cell_id in cell_ids
    ]


def _ending(cell: Any) -> str:
    """Return how a cell ended, and why if it did not end well."""
    message = cell["message"]
    return str(cell["status"]) + (f": {message}" if message else "")


def _nothing_compared(unchecked: Sequence[str]) -> Finding:
    """Return the finding of a check without a number, of which nothing would fail.

    Args:
        unchecked: cells to which no threshold applies; if there are none, the baseline
            has no ok cell.
    """
    if unchecked:
        return Finding(
            kind=Kind.NOT_COMPARABLE,
            cell_id="all cells",
            expected="a threshold that applies to an ok cell of the baseline",
            got="none",
            advice="give --fail-on a pattern of such a cell, or none for all cells",
        )
    return Finding(
        kind=Kind.NOT_COMPARABLE,
        cell_id="all cells",
        expected="at least one ok cell in the baseline",
        got="none",
        advice="write one with meft-report baseline",
    )


def _note_unchecked(unchecked: Sequence[str]) -> list[str]:
    """Return a line on the cells to which no threshold applies, if there are any."""
    if not unchecked:
        return []
    left_out = len(unchecked) - MAX_NAMES
    names = [*unchecked[:MAX_NAMES], *([f"{left_out} more"] if left_out > 0 else [])]
    return [
        f"note: {plural(len(unchecked), 'cell')} not checked, as no threshold of "
        f"--fail-on applies: {', '.join(names)}"
    ]


def _notes(
    baseline: pd.DataFrame, expected_cells: pd.DataFrame, got_cells: pd.DataFrame
) -> list[str]:
    """Return the differences between the cells of both sides, a line per fact."""
    notes = []
    num_failed = len(baseline) - len(expected_cells)
    if num_failed:
        notes.append(f"note: the baseline holds {plural(num_failed, 'cell')} not ok")
    both = expected_cells.index.intersection(got_cells.index)
    before, after = _facts(expected_cells.loc[both]), _facts(got_cells.loc[both])
    for name in sorted(before.keys() | after.keys(), key=str):
        nothing = ["unknown"] * len(both)
        pairs = Counter(
            zip(before.get(name, nothing), after.get(name, nothing), strict=True)
        )
        differing = [
            f"{one} in the baseline, {other} in the runs ({plural(count, 'cell')})"
            for (one, other), count in pairs.most_common()
            if one != other
        ]
        if differing:
            num_more = len(differing) - MAX_PAIRS
            more = [f"{num_more} more"] if num_more > 0 else []
            notes.append(f"note: {name}: {'; '.join(differing[:MAX_PAIRS] + more)}")
    return notes


def _facts(cells: pd.DataFrame) -> dict[str, list[str]]:
    """Return the facts whose differences are reported: values of all cells by name."""
    facts = {
        words: [_said(name, value) for value in cells[name]]
        for name, words in SAID.items()
    }
    versions = [json.loads(text) for text in cells["versions"]]
    for package in sorted({name for its in versions for name in its}):
        facts[f"version of {package}"] = [
            its.get(package, "unknown") for its in versions
        ]
    return facts


def _said(name: str, value: Any) -> str:
    text = format_fact(value)
    return text[:8] if name == "code_sha256" else text
