"""Two runs side by side: before, after, ratio, the worst first.

Bytes are exact, so any difference is one. Times are compared between runs of one
machine, number of threads and number of parallel cells only, by the median of the steps
after warm-up; a difference that a Mann-Whitney test does not tell from noise is marked
`~`, and so is one of too few steps. One value of a score has no interval here, so
scores are listed with their difference. What differs in the environment of many cells
is said once.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import mannwhitneyu

from meft_reports.breakdown import what_grew
from meft_reports.check import EXPLAINED, SAVED, Breakdowns
from meft_reports.columns import BY_NAME
from meft_reports.columns.column import Column
from meft_reports.format import format_value, is_null
from meft_reports.records import breakdowns_of
from meft_reports.text import plural, printable

COLUMNS = (
    *(SAVED, "peak_allocated_bytes", "peak_reserved_bytes", "peak_host_bytes"),
    *("h2d_bytes", "d2h_bytes", "step_seconds", "score"),
)
"""Columns that are compared, without what only noise changes."""
NOISY = ("peak_host_bytes",)
SAME_FOR_SECONDS = ("machine", "num_threads", "num_slots", "device_name")
LEAST_STEPS = 6
"""Number of steps on each side below which times are not told apart."""
MOST_CHANCE = 0.05
MAX_LINES = 20
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Changed:
    """A number of a cell in two runs."""

    cell_id: str
    column: Column
    before: float
    after: float
    mark: str
    """`~` if the difference may be noise, with the reason; else empty."""
    grew: tuple[str, ...]

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

    def lines(self) -> list[str]:
        """Return it as lines of text."""
        before, after = (
            format_value(value, self.column.unit) for value in (self.before, self.after)
        )
        ratio = "" if math.isinf(self.ratio) else f"  {self.ratio:.4f}x"
        head = f"{self.cell_id}  {self.column.short_name}  {before} → {after}{ratio}"
        return [f"  {head}{self.mark}", *(f"      {line}" for line in self.grew)]


def compare(
    before: Sequence[Record],
    after: Sequence[Record],
    *,
    shows_all: bool = False,
    num_changes: int = 3,
) -> str:
    """Return the comparison of two runs as text.

    Args:
        before: the records that count of the first run.
        after: those of the second one.
        shows_all: whether every difference is listed, and cells without one.
        num_changes: number of changes of memory that a difference lists.
    """
    old, new = ({r["cell_id"]: r for r in records} for records in (before, after))
    both = [name for name in old if name in new]
    differences, same = _differences(old, new, both, num_changes)
    lines = [
        f"A: {_described(before)}",
        f"B: {_described(after)}",
        f"{plural(len(both), 'cell')} in both, {len(old) - len(both)} only in A, "
        f"{len(new) - len(both)} only in B",
        *_endings(old, new, both),
        *_environment(old, new, both),
    ]
    worse = [one for one in differences if one.is_worse]
    better = [one for one in differences if not one.is_worse]
    for title, some in (("worse", worse), ("better", better)):
        lines += _listed(title, some, shows_all)
    hidden = "" if shows_all else " hidden; --all shows them"
    lines.append(f"same ({len(same)}){hidden}")
    lines += [f"  {name}" for name in same if shows_all]
    lines += _means(old, new, both)
    return "\n".join(printable(line, 2_000) for line in lines)


def _differences(
    old: Mapping[str, Record],
    new: Mapping[str, Record],
    both: Sequence[str],
    num_changes: int,
) -> tuple[list[Changed], list[str]]:
    """Return differences, the largest first, and the names of cells without any."""
    kept: tuple[Breakdowns, Breakdowns] = (
        breakdowns_of([*old.values()]),
        breakdowns_of([*new.values()]),
    )
    found: list[Changed] = []
    same = []
    for name in both:
        its = []
        for column in (BY_NAME[one] for one in COLUMNS if one not in NOISY):
            pair = [its_value(run[name], column) for run in (old, new)]
            one, other = pair
            if one is None or other is None or one == other:
                continue
            mark = ""
            if column.unit == "seconds":
                mark = _noise(old[name], new[name])
            grew = _grew(name, column, kept, int(other - one), num_changes)
            its.append(
                Changed(
                    cell_id=name,
                    column=column,
                    before=one,
                    after=other,
                    mark=mark,
                    grew=grew,
                )
            )
        found += its
        if not its:
            same.append(name)
    found.sort(key=lambda one: -_size(one))
    return found, same


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
    name: str,
    column: Column,
    kept: tuple[Breakdowns, Breakdowns],
    difference: int,
    most: int,
) -> tuple[str, ...]:
    before, after = (its.get(name) for its in kept)
    if before is None or after is None or column.name not in EXPLAINED:
        return ()
    growth = what_grew(before, after, difference, is_saved=column.name == SAVED)
    return tuple(growth.lines(most))


def _noise(before: Record, after: Record) -> str:
    """Return a mark if two times cannot be told apart, with the reason."""
    for name in SAME_FOR_SECONDS:
        if before["environment"].get(name) != after["environment"].get(name):
            return f"  ~ another {name}"
    steps = [
        [s for s in r["measurement"].get("all_step_seconds") or [] if s is not None]
        for r in (before, after)
    ]
    steps = [
        its[int(r["cell"].get("warmup_steps", 0)) :]
        for its, r in zip(steps, (before, after), strict=True)
    ]
    if min(map(len, steps)) < LEAST_STEPS:
        return "  ~ too few steps"
    chance = float(mannwhitneyu(*steps).pvalue)
    return "" if chance <= MOST_CHANCE else f"  ~ p = {chance:.2f}"


def _listed(title: str, some: Sequence[Changed], shows_all: bool) -> list[str]:
    cells = len({one.cell_id for one in some})
    lines = [f"{title} ({plural(len(some), 'number')} of {plural(cells, 'cell')})"]
    shown = some if shows_all else some[:MAX_LINES]
    for one in shown:
        lines += one.lines()
    if len(some) > len(shown):
        lines.append(f"  and {len(some) - len(shown)} more; --all shows them")
    return lines


def _described(records: Sequence[Record]) -> str:
    """Return the commits and the number of records of a run."""
    commits = Counter(
        f"{(r['environment'].get('commit') or 'no commit'):.8}"
        + ("+" if r["environment"].get("dirty") else "")
        for r in records
    )
    shown = ", ".join(name for name, _ in commits.most_common(3))
    more = f" and {len(commits) - 3} more" if len(commits) > 3 else ""
    return f"{plural(len(records), 'cell')}, commit {shown}{more}"


def _endings(
    old: Mapping[str, Record], new: Mapping[str, Record], both: Sequence[str]
) -> list[str]:
    """Return the cells that ended in another way, in lines."""
    return [
        f"ended: {name}  {old[name]['status']} → {new[name]['status']}"
        for name in both
        if old[name]["status"] != new[name]["status"]
    ]


def _environment(
    old: Mapping[str, Record], new: Mapping[str, Record], both: Sequence[str]
) -> list[str]:
    """Return what differs in the environments, a line for each difference."""
    found: Counter[tuple[str, str, str]] = Counter()
    for name in both:
        for fact, before, after in _facts(old[name], new[name]):
            found[fact, before, after] += 1
    if not found:
        return ["same environment in all of them"]
    return [
        f"differs: {fact}  {before} → {after}  ({plural(count, 'cell')})"
        for (fact, before, after), count in found.most_common(MAX_LINES)
    ]


def _facts(before: Record, after: Record) -> list[tuple[str, str, str]]:
    one, other = before["environment"], after["environment"]
    names = ("machine", "num_threads", "num_slots", "device_name", "weights_sha256")
    pairs = [(name, one.get(name), other.get(name)) for name in names]
    versions = sorted({*one["versions"], *other["versions"]})
    pairs += [(v, one["versions"].get(v), other["versions"].get(v)) for v in versions]
    return [(name, str(a), str(b)) for name, a, b in pairs if a != b]


def _means(
    old: Mapping[str, Record], new: Mapping[str, Record], both: Sequence[str]
) -> list[str]:
    """Return the geometric mean of the ratios of each column, over cells in both."""
    lines = []
    for column in (BY_NAME[name] for name in COLUMNS if name != "score"):
        pairs = [
            (its_value(old[name], column), its_value(new[name], column))
            for name in both
            if column.unit != "seconds" or not _noise(old[name], new[name])
        ]
        ratios = [math.log(b / a) for a, b in pairs if a and b]
        if ratios:
            mean = math.exp(sum(ratios) / len(ratios))
            lines.append(
                f"geometric mean of ratios: {column.short_name} {mean:.4f} "
                f"({plural(len(ratios), 'cell')})"
            )
    return lines
