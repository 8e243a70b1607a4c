"""Paired differences of scores: one setting less another, over the seeds of both.

A score has two sources of randomness, so there are two intervals: over seeds and, where
the answers to each row are known, over evaluated rows. A setting is *ahead* of another
if both tests exclude a difference of 0 at 5 %, corrected by Holm's method for the
number of settings that are compared with the same one. Otherwise the run does not tell
them apart; they are never said to be equal.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meft_reports.methods import TABLE
from meft_reports.page.cells import Cell, is_trained
from meft_reports.page.intervals import Interval, holm, over_rows, over_seeds
from meft_reports.page.settings import Setting
from meft_reports.summary import OPTIONS

LEVEL = 0.05
_OF_METHODS = {name for method in TABLE.values() for name in method.options}
MUST_AGREE = tuple(
    name
    for name in OPTIONS
    if name not in {*_OF_METHODS, "learning_rate", "warmup_steps", "reference"}
)
"""Options of the training, in which two settings have to agree to be compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedDifference:
    """The score of `setting` less that of `against`, on equal seeds."""

    setting: Setting
    against: Setting
    num_seeds: int
    seeds: Interval
    rows: Interval | None
    """None where the answers to each row are not known."""
    num_rows: int
    p: float
    """Larger p-value of the two tests, corrected by Holm's method."""

    @property
    def verdict(self) -> str:
        """`ahead`, `behind` or `not told apart`."""
        if self.p >= LEVEL:
            return "not told apart"
        return "ahead" if self.seeds.mean > 0 else "behind"

    def to_json(self) -> dict[str, Any]:
        """Return the row of the pair in the page's data."""
        rows = self.rows
        return {
            "w": self.setting.workload.index,
            "cell": self.setting.cells[0]["index"],
            "name": self.setting.name,
            "method": self.setting.method,
            "against": self.against.name,
            "against_method": self.against.method,
            "difference": self.seeds.mean,
            "low": self.seeds.low,
            "high": self.seeds.high,
            "row_low": rows and rows.low,
            "row_high": rows and rows.high,
            "num_seeds": self.num_seeds,
            "num_rows": self.num_rows or None,
            "p": self.p,
            "verdict": self.verdict,
        }


def pairs_of(settings: Sequence[Setting]) -> list[PairedDifference]:
    """Return all pairs of settings of one workload that have two seeds in common."""
    by_workload: dict[int, list[tuple[Setting, dict[int, Cell]]]] = {}
    for setting in settings:
        scored = {
            cell["seed"]: cell
            for cell in setting.ok
            if cell["score"] is not None and is_trained(cell)
        }
        if len(scored) > 1:
            its = by_workload.setdefault(setting.workload.index, [])
            its.append((setting, scored))
    pairs = []
    for its in by_workload.values():
        for against, its_cells in its:
            family = [
                pair
                for setting, cells in its
                if setting is not against
                and (pair := _pair(setting, cells, against, its_cells)) is not None
            ]
            pairs += _corrected(family)
    return pairs


def _pair(
    setting: Setting, mine: dict[int, Cell], against: Setting, its: dict[int, Cell]
) -> PairedDifference | None:
    one, other = setting.cells[0], against.cells[0]
    if any(one[name] != other[name] for name in MUST_AGREE):
        return None
    seeds = sorted(mine.keys() & its.keys())
    if len(seeds) < 2:
        return None
    over = over_seeds([mine[s]["score"] - its[s]["score"] for s in seeds])
    by_row = _by_row([mine[s] for s in seeds], [its[s] for s in seeds])
    rows = over_rows(by_row) if by_row else None
    return PairedDifference(
        setting=setting,
        against=against,
        num_seeds=len(seeds),
        seeds=over,
        rows=rows,
        num_rows=len(by_row or ()),
        p=max(over.p, rows.p if rows else 0.0),
    )


def _by_row(mine: Sequence[Cell], its: Sequence[Cell]) -> list[float] | None:
    """Return the differences per row, averaged over seeds; None if unknown."""
    cells = [*mine, *its]
    if not all(map(_is_share, cells)):
        return None
    if len({len(cell["right_rows"]) for cell in cells}) != 1:
        return None
    one, other = (
        [
            statistics.fmean(row)
            for row in zip(*(cell["right_rows"] for cell in some), strict=True)
        ]
        for some in (mine, its)
    )
    return [a - b for a, b in zip(one, other, strict=True)]


def _is_share(cell: Cell) -> bool:
    """Return whether the score is the share of right rows."""
    right = cell["right_rows"]
    if not right:
        return False
    return math.isclose(sum(right) / len(right), cell["score"], abs_tol=1e-6)


def _corrected(family: Sequence[PairedDifference]) -> list[PairedDifference]:
    corrected = holm([pair.p for pair in family])
    return [
        PairedDifference(
            setting=pair.setting,
            against=pair.against,
            num_seeds=pair.num_seeds,
            seeds=pair.seeds,
            rows=pair.rows,
            num_rows=pair.num_rows,
            p=p,
        )
        for pair, p in zip(family, corrected, strict=True)
    ]
