"""Frame against baseline, cell by cell: findings, and an exit code.

    0  fine              every compared number is within what is allowed
    1  regression        a number is worse by more, or a cell of the baseline is missing
    3  not comparable    two torch versions, devices or machines, or no number
    4  a cell failed     which the baseline holds as ok

(2 is the command line's own: it was used wrongly.) Where several apply the code is that
of the first of 4, 1, 3. Cells are joined by `cell_id`, which names every field of a
cell. What is better by more than is allowed is reported and passes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any

import pandas as pd

from meft_reports.columns.column import Column
from meft_reports.format import format_value, is_null
from meft_reports.threshold import Threshold


class Kind(StrEnum):
    """What a finding says."""

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
SAME_FOR_SCORE = (*SAME_FOR_ALL, "weights_sha256", "data_origin")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One difference between the run and the baseline."""

    kind: Kind
    cell_id: str
    column: str = ""
    """Empty where the finding is about the whole cell."""
    expected: str
    got: str
    difference: str = ""
    allowed: str = ""
    advice: str = ""

    def __str__(self) -> str:
        """The finding as a few lines for a terminal."""
        facts = {
            "expected": self.expected,
            "got": self.got,
            "difference": self.difference,
            "allowed": self.allowed,
        }
        head = f"{self.kind}: {self.cell_id}" + (f" {self.column}" * bool(self.column))
        lines = [f"  {name:<10} {fact}" for name, fact in facts.items() if fact]
        return "\n".join([head, *lines, *([f"  {self.advice}"] if self.advice else [])])


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """All findings, and how much was compared to arrive at them."""

    findings: tuple[Finding, ...]
    num_cells: int
    """Cells of the baseline."""
    num_compared: int
    """Numbers that were held against each other."""

    @property
    def exit_code(self) -> int:
        """0, 1, 3 or 4, as the module says."""
        kinds = {finding.kind for finding in self.findings}
        return next((code for kind, code in EXIT_CODES.items() if kind in kinds), 0)

    def __str__(self) -> str:
        """Every finding, then one line that sums them up."""
        counts = [
            f"{sum(f.kind == kind for f in self.findings)} {kind}"
            for kind in Kind
            if any(f.kind == kind for f in self.findings)
        ]
        summary = (
            f"{self.num_cells} cells in the baseline, {self.num_compared} numbers "
            f"compared: {', '.join(counts) or 'no difference beyond what is allowed'}"
        )
        return "\n".join([*map(str, self.findings), summary])


def check(
    frame: pd.DataFrame, baseline: pd.DataFrame, thresholds: Sequence[Threshold]
) -> CheckResult:
    """Hold every ok cell of `baseline` against the cell of the same id in `frame`.

    Both are frames of `read_frame`; only the columns of `thresholds` are compared.
    """
    expected_cells = baseline[baseline["status"] == "ok"].set_index("cell_id")
    got_cells = frame.set_index("cell_id")
    findings: list[Finding] = []
    num_compared = 0
    for cell_id, expected in expected_cells.iterrows():
        name = str(cell_id)
        if name not in got_cells.index:
            findings.append(_missing(name))
            continue
        got = got_cells.loc[name]
        if got["status"] != "ok":
            findings.append(_failed(name, got))
            continue
        for threshold in thresholds:
            finding, compared = _compare(name, threshold, expected, got)
            findings += [finding] if finding else []
            num_compared += compared
    findings += _new(got_cells.index.difference(expected_cells.index), got_cells)
    if expected_cells.empty:
        findings.append(_nothing_to_compare())
    return CheckResult(
        findings=tuple(findings),
        num_cells=len(expected_cells),
        num_compared=num_compared,
    )


def _compare(
    cell_id: str, threshold: Threshold, expected: Any, got: Any
) -> tuple[Finding | None, bool]:
    """The finding of one number of one cell, and whether it could be compared."""
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
        ), False
    before, after = _exact(column, expected), _exact(column, got)
    difference, allowed = after - before, threshold.allowed(before)
    if abs(difference) <= allowed:
        return None, True
    better = column.lower_is_better is not None and (
        (difference < 0) == column.lower_is_better
    )
    sign = "+" if difference > 0 else "-"
    return Finding(
        kind=Kind.IMPROVED if better else Kind.REGRESSION,
        cell_id=cell_id,
        column=column.name,
        expected=format_value(expected[column.name], column.unit),
        got=format_value(got[column.name], column.unit),
        difference=sign + format_value(abs(difference), column.unit),
        allowed=format_value(allowed, column.unit),
        advice="consider updating the baseline" if better else "",
    ), True


def _exact(column: Column, cell: Any) -> Fraction:
    # By way of Python's own numbers: those of numpy are bounded and would overflow.
    value = cell[column.name]
    return Fraction(int(value) if column.dtype == "Int64" else float(value))


def _why_not(column: Column, expected: Any, got: Any) -> tuple[str, str, str] | None:
    """What keeps two cells' numbers apart: both values, and a word of advice."""
    for name in _must_match(column):
        before, after = expected[name], got[name]
        both_null = is_null(before) and is_null(after)
        # A torch that nobody wrote down may be any torch.
        if both_null and name != "torch_version":
            continue
        if both_null or is_null(before) or is_null(after) or before != after:
            return _fact(name, before), _fact(name, after), _advice(name)
    if column.unit == "seconds" and got["num_slots"] > 1:
        slots = f"{got['num_slots']} cells side by side"
        return slots, slots, "times are comparable within one such run only"
    if column.name == "score" and expected["score_name"] != got["score_name"]:
        return str(expected["score_name"]), str(got["score_name"]), "another metric"
    if is_null(expected[column.name]) or is_null(got[column.name]):
        values = [
            format_value(cell[column.name], column.unit) for cell in (expected, got)
        ]
        return values[0], values[1], "a number that was not measured proves nothing"
    return None


def _must_match(column: Column) -> Iterable[str]:
    if column.unit == "seconds":
        return SAME_FOR_SECONDS
    return SAME_FOR_SCORE if column.name == "score" else SAME_FOR_ALL


def _fact(name: str, value: Any) -> str:
    return f"{name} {'unknown' if is_null(value) else value}"


def _advice(name: str) -> str:
    return f"make a baseline with the same {name}, or run with that of the baseline"


def _missing(cell_id: str) -> Finding:
    return Finding(
        kind=Kind.MISSING,
        cell_id=cell_id,
        expected="an ok cell, as in the baseline",
        got="no such cell in the runs",
        advice="run the whole sweep, or update the baseline if the cell was removed",
    )


def _failed(cell_id: str, got: Any) -> Finding:
    return Finding(
        kind=Kind.FAILED,
        cell_id=cell_id,
        expected="ok",
        got=f"{got['status']}: {got['message']}",
    )


def _new(cell_ids: Iterable[Any], cells: pd.DataFrame) -> list[Finding]:
    return [
        Finding(
            kind=Kind.NEW,
            cell_id=str(cell_id),
            expected="not in the baseline",
            got=str(cells.loc[cell_id, "status"]),
        )
        for cell_id in cell_ids
    ]


def _nothing_to_compare() -> Finding:
    return Finding(
        kind=Kind.NOT_COMPARABLE,
        cell_id="all cells",
        expected="at least one ok cell in the baseline",
        got="none",
        advice="write one with meft-report baseline",
    )
