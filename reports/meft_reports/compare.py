"""Two runs side by side, as data: before, after, ratio, the worst first.

Bytes are exact, so any difference is one. Times are compared between runs of one
machine, number of threads and number of parallel cells only, by the median of the steps
after warm-up, with an interval of 95 % of the ratio of the medians (bootstrap over the
steps); a difference that a Mann-Whitney test does not tell from noise has a doubt, and
so has one of too few steps. Predicted times are columns of their own, and as
exact as bytes. One value of a score has no interval here, so scores are listed with
their difference; scores of different metrics, rows or weights are not compared. What
differs in the environment of many cells is one cause.

`compare_text` and `compare_page` show it; `pairing` says which cells are compared.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from meft_reports import commits
from meft_reports.breakdown import what_grew
from meft_reports.check import EXPLAINED, SAVED
from meft_reports.columns import BY_NAME
from meft_reports.columns.column import Column
from meft_reports.columns.environment import FOR_SCORES
from meft_reports.conditions import (
    FOR_HOST_MEMORY,
    FOR_SECONDS,
    facts_of,
    first_difference,
)
from meft_reports.contaminated import is_contaminated
from meft_reports.format import format_fact, format_value, is_null
from meft_reports.pairing import PairedCell, pair
from meft_reports.text import plural
from meft_reports.valid_records import READERS, Record

COLUMNS = (
    *(SAVED, "peak_allocated_bytes", "peak_reserved_bytes", "peak_host_bytes"),
    *("h2d_bytes", "d2h_bytes", "step_seconds"),
    *("seconds_at_least", "link_seconds_at_least", "score"),
)
"""Columns that are compared, without what only noise changes."""
SCORE = "score"
NOISY = ("peak_host_bytes",)
LEAST_STEPS = 6
"""Number of steps on each side below which times are not tested."""
MOST_CHANCE = 0.05
NUM_RESAMPLES = 2_000
TAILS = (0.025, 0.975)
"""Quantiles of the ends of an interval of 95 %."""
MOST_COMMITS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Changed:
    """A number of a cell in two runs."""

    cell_id: str
    column: Column
    before: float
    after: float
    doubt: str
    """Why the difference may be noise; else empty."""
    interval: tuple[float, float] | None = None
    """Of 95 % of the ratio, for times with enough steps; else None."""
    grew: tuple[str, ...]
    """What of the memory grew, in lines."""

    @property
    def ratio(self) -> float:
        """After divided by before; infinite from 0 on."""
        if self.before == self.after:
            return 1.0
        return self.after / self.before if self.before else math.inf

    @property
    def is_worse(self) -> bool:
        """Whether the number is worse than before."""
        return (self.after > self.before) == (self.column.lower_is_better is not False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """A cell that ended in another way, or a number that one run alone has."""

    cell_id: str
    before: str
    after: str
    message: str
    """That of the second run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """A fact that differs between the two runs, in some cells or in all of them."""

    fact: str
    before: str
    after: str
    num_cells: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """The geometric mean of the ratios of a column."""

    column: Column
    ratio: float
    num_cells: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two runs side by side."""

    before: str
    """Number of cells and commits of the first run, in words."""
    after: str
    num_pairs: int
    """Number of cells in both."""
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    endings: tuple[Ending, ...]
    causes: tuple[Cause, ...]
    """Those of most cells first."""
    not_compared: tuple[Cause, ...]
    """Facts that differ between scores, which are therefore not compared."""
    worse: tuple[Changed, ...]
    """Those farthest from 1 first, after them those that may be noise."""
    better: tuple[Changed, ...]
    same: tuple[str, ...]
    """Cells of which no number differs."""
    means: tuple[Mean, ...]


def compare(
    before: Sequence[Record],
    after: Sequence[Record],
    *,
    ignored: Sequence[str] = (),
    num_changes: int = 3,
) -> Comparison:
    """Return the comparison of two runs.

    Args:
        before: the records that count of the first run.
        after: those of the second one.
        ignored: fields in which two cells that are compared may differ.
        num_changes: number of changes of memory that a difference lists.

    Raises:
        ReportError: without the fields, several cells of a run are one.
    """
    paired = pair(before, after, ignored)
    by_cell = [[*_changes(one, num_changes)] for one in paired.pairs]
    changes = sorted(
        (one for its in by_cell for one in its),
        key=lambda change: (bool(change.doubt), -_size(change)),
    )
    endings = tuple(_endings(paired.pairs))
    refused = {one.cell_id: found for one in paired.pairs if (found := _refused(one))}
    differing = {ending.cell_id for ending in endings} | refused.keys()
    return Comparison(
        before=_described(before),
        after=_described(after),
        num_pairs=len(paired.pairs),
        only_before=paired.only_before,
        only_after=paired.only_after,
        endings=endings,
        causes=_causes(paired.pairs, ignored),
        not_compared=_counted(Counter(refused.values())),
        worse=tuple(one for one in changes if one.is_worse),
        better=tuple(one for one in changes if not one.is_worse),
        same=tuple(
            one.cell_id
            for one, its in zip(paired.pairs, by_cell, strict=True)
            if not its and one.cell_id not in differing
        ),
        means=tuple(_means([one for one in paired.pairs if _are_whole(one)])),
    )


def _are_whole(cell: PairedCell) -> bool:
    """Return whether both records are of a cell that has ended well.

    Numbers of others are those of a part of the work.
    """
    return {cell.before["status"], cell.after["status"]} == {"ok"}


def _changes(cell: PairedCell, num_changes: int) -> Iterator[Changed]:
    if not _are_whole(cell):
        return
    for column in (BY_NAME[name] for name in COLUMNS if name not in NOISY):
        before, after = (its_value(run, column) for run in (cell.before, cell.after))
        if before is None or after is None or before == after:
            continue
        if column.name == SCORE and _refused(cell):
            continue
        yield Changed(
            cell_id=cell.cell_id,
            column=column,
            before=before,
            after=after,
            doubt=_doubt(cell) if column.is_measured_time else "",
            interval=_interval(cell) if column.is_measured_time else None,
            grew=_grew(cell, column, int(after - before), num_changes),
        )


def _size(difference: Changed) -> float:
    """Return how far a ratio is from 1."""
    ratio = difference.ratio
    return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf


def its_value(record: Record, column: Column) -> float | None:
    """Return a number of a record; None if it is not there or not finite."""
    value = record["measurement"].get(column.name)
    if is_null(value) or not math.isfinite(value):
        return None
    return float(value) if column.dtype == "Float64" else int(value)


def _grew(
    cell: PairedCell, column: Column, difference: int, most: int
) -> tuple[str, ...]:
    before, after = (run.get("memory_breakdown") for run in (cell.before, cell.after))
    if before is None or after is None or column.name not in EXPLAINED:
        return ()
    growth = what_grew(before, after, difference, is_saved=column.name == SAVED)
    return tuple(growth.lines(most))


def _refused(cell: PairedCell) -> tuple[str, str, str] | None:
    """Return the fact because of which two scores are not compared, with both values.

    It is None where they are compared, and where one of them is not there.
    """
    column, runs = BY_NAME[SCORE], (cell.before, cell.after)
    if not _are_whole(cell) or None in [its_value(run, column) for run in runs]:
        return None
    return first_difference(*(facts_of(run, column) for run in runs))


def _doubt(cell: PairedCell) -> str:
    """Return why a difference of two times may be noise; else empty."""
    if differing := _other_place(cell):
        return f"another {differing}"
    steps = _steps(cell.before), _steps(cell.after)
    if min(map(len, steps)) < LEAST_STEPS:
        return "too few steps"
    chance = float(mannwhitneyu(*steps).pvalue)
    return "" if chance <= MOST_CHANCE else f"p = {chance:.2f}"


def _other_place(cell: PairedCell) -> str:
    """Return the fact because of which two times may not be compared; else empty."""
    runs = (cell.before, cell.after)
    before, after = (facts_of(run, BY_NAME["step_seconds"]) for run in runs)
    differing = first_difference(before, after)
    return differing[0] if differing else ""


def _steps(run: Record) -> list[float]:
    """Return the times of the steps after warm-up."""
    steps = [
        s for s in run["measurement"].get("all_step_seconds") or [] if s is not None
    ]
    return steps[int(run["cell"].get("warmup_steps", 0)) :]


def _interval(cell: PairedCell) -> tuple[float, float] | None:
    """Return the interval of the ratio of the median steps; None if it is unknown."""
    before, after = _steps(cell.before), _steps(cell.after)
    few = min(len(before), len(after)) < LEAST_STEPS
    if few or min(before) <= 0 or _other_place(cell):
        return None
    random = np.random.default_rng(0)  # the same records give the same interval
    old, new = (
        np.median(random.choice(its, (NUM_RESAMPLES, len(its))), axis=1)
        for its in (before, after)
    )
    low, high = np.quantile(new / old, TAILS)
    return float(low), float(high)


def _described(records: Sequence[Record]) -> str:
    """Return the commits and the number of records of a run."""
    found = Counter(map(commits.in_words, records))
    shown = ", ".join(name for name, _ in found.most_common(MOST_COMMITS))
    left_out = len(found) - MOST_COMMITS
    more = f" and {left_out} more" if left_out > 0 else ""
    return f"{plural(len(records), 'cell')}, {shown}{more}"


def _endings(pairs: Sequence[PairedCell]) -> Iterator[Ending]:
    for one in pairs:
        before, after = one.before["status"], one.after["status"]
        if before != after:
            yield Ending(
                cell_id=one.cell_id,
                before=before,
                after=after,
                message=one.after["message"],
            )
            continue
        for name in COLUMNS:
            column = BY_NAME[name]
            values = [its_value(run, column) for run in (one.before, one.after)]
            if (values[0] is None) == (values[1] is None):
                continue
            old, new = (
                f"{column.short_name} {format_value(value, column.unit)}"
                if value is not None
                else _absent(run, column)
                for value, run in zip(values, (one.before, one.after), strict=True)
            )
            yield Ending(cell_id=one.cell_id, before=old, after=new, message="")


def _absent(run: Record, column: Column) -> str:
    """Return why a record lacks a number, in words."""
    if column.is_shared and is_contaminated(run["measurement"]):
        return "contaminated by another process on the GPU"
    return "not measured"


def _causes(pairs: Sequence[PairedCell], ignored: Sequence[str]) -> tuple[Cause, ...]:
    """Return what differs in the cells and their environments."""
    found: Counter[tuple[str, str, str]] = Counter()
    for one in pairs:
        facts = _facts(one.before, one.after)
        for name in ignored:
            before, after = map(READERS[name], (one.before, one.after))
            facts.append((name, format_fact(before), format_fact(after)))
        found.update(fact for fact in facts if fact[1] != fact[2])
    return _counted(found)


def _counted(found: "Counter[tuple[str, str, str]]") -> tuple[Cause, ...]:
    return tuple(
        Cause(fact=fact, before=before, after=after, num_cells=count)
        for (fact, before, after), count in found.most_common()
    )


def _facts(before: Record, after: Record) -> list[tuple[str, str, str]]:
    one, other = before["environment"], after["environment"]
    names = (*FOR_SECONDS, *FOR_SCORES, "prediction")
    pairs: list[tuple[str, Any, Any]] = [
        (fact, words(before), words(after))
        for fact, words in (("code", commits.of_suite), ("project", commits.of_project))
    ]
    pairs += [(name, one.get(name), other.get(name)) for name in names]
    # Older records do not say it, and their children were no forks.
    pairs += [(n, bool(one.get(n)), bool(other.get(n))) for n in FOR_HOST_MEMORY]
    versions = sorted({*one["versions"], *other["versions"]})
    pairs += [(v, one["versions"].get(v), other["versions"].get(v)) for v in versions]
    return [(name, format_fact(a), format_fact(b)) for name, a, b in pairs]


def _are_comparable(cell: PairedCell, column: Column) -> bool:
    """Return whether two numbers of a cell were measured under the same conditions."""
    if column.is_measured_time:
        return not _doubt(cell)
    facts = [facts_of(run, column) for run in (cell.before, cell.after)]
    return first_difference(*facts) is None


def _means(pairs: Sequence[PairedCell]) -> Iterator[Mean]:
    """Yield the geometric mean of the ratios of each column, over cells in both."""
    for column in (BY_NAME[name] for name in COLUMNS if name != SCORE):
        values = [
            (its_value(one.before, column), its_value(one.after, column))
            for one in pairs
            if _are_comparable(one, column)
        ]
        ratios = [math.log(b / a) for a, b in values if a and b]
        if ratios:
            yield Mean(
                column=column,
                ratio=math.exp(sum(ratios) / len(ratios)),
                num_cells=len(ratios),
            )
