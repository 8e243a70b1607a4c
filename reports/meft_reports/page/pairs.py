"""Paired differences of scores: one setting less another, over the seeds of both.

A score has two sources of randomness, seeds and evaluated rows, and the interval is
over both where it is known what each row contributes, otherwise over seeds. A setting
is *ahead* of another if the test excludes a difference of 0 at 5 %, corrected by Holm's
method for the number of settings that are compared with the same one. Otherwise there
is no significant difference; they are never said to be equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meft_reports.columns.environment import FOR_SCORES
from meft_reports.intervals import (
    Interval,
    holm,
    over_seeds,
    over_seeds_and_rows,
    row_values,
    same_rows,
)
from meft_reports.methods import TABLE
from meft_reports.page.cells import Cell, is_trained
from meft_reports.page.settings import Setting
from meft_reports.summary import OPTIONS

LEVEL = 0.05
TIE = "no significant difference"
_OF_METHODS = {name for method in TABLE.values() for name in method.options}
MUST_AGREE = tuple(
    name
    for name in OPTIONS
    if name not in {*_OF_METHODS, "learning_rate", "warmup_steps", "reference"}
)
"""Options of the training, in which two settings have to agree to be compared."""
OF_SCORES = (*FOR_SCORES, "num_eval_rows")
"""What scores depend on, where both settings say so: weights, and rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedDifference:
    """The score of `setting` less that of `against`, on equal seeds."""

    setting: Setting
    against: Setting
    num_seeds: int
    interval: Interval
    num_rows: int
    """0 where it is not known what rows contribute: the interval is over seeds then."""
    p: float
    """P-value of the difference being 0, corrected by Holm's method."""

    @property
    def verdict(self) -> str:
        """`ahead`, `behind` or `TIE`."""
        if self.p >= LEVEL:
            return TIE
        return "ahead" if self.interval.mean > 0 else "behind"

    def to_json(self) -> dict[str, Any]:
        """Return the row of the pair in the page's data."""
        return {
            "w": self.setting.workload.index,
            "cell": self.setting.cells[0]["index"],
            "name": self.setting.name,
            "method": self.setting.method,
            "against": self.against.name,
            "against_method": self.against.method,
            "difference": self.interval.mean,
            "low": self.interval.low,
            "high": self.interval.high,
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
    known = [n for n in OF_SCORES if None not in (one[n], other[n])]
    if any(one[name] != other[name] for name in known):
        return None
    seeds = sorted(mine.keys() & its.keys())
    if len(seeds) < 2:
        return None
    interval, num_rows = difference([mine[s] for s in seeds], [its[s] for s in seeds])
    return PairedDifference(
        setting=setting,
        against=against,
        num_seeds=len(seeds),
        interval=interval,
        num_rows=num_rows,
        p=interval.p,
    )


def difference(mine: Sequence[Cell], its: Sequence[Cell]) -> tuple[Interval, int]:
    """Return the difference of scores with its interval, and over how many rows.

    Args:
        mine: cells of a setting.
        its: those of another one, of the same seeds in the same order.
    """
    rows = same_rows([_row_values(cell) for cell in (*mine, *its)])
    if rows is None:
        pairs = zip(mine, its, strict=True)
        return over_seeds([one["score"] - other["score"] for one, other in pairs]), 0
    less = np.asarray(rows[: len(mine)], float) - np.asarray(rows[len(mine) :], float)
    return over_seeds_and_rows(less), len(rows[0])


def _row_values(cell: Cell) -> Sequence[float] | None:
    return row_values(cell["score"], cell["right_rows"], cell["row_scores"])


def _corrected(family: Sequence[PairedDifference]) -> list[PairedDifference]:
    corrected = holm([pair.p for pair in family])
    return [
        PairedDifference(
            setting=pair.setting,
            against=pair.against,
            num_seeds=pair.num_seeds,
            interval=pair.interval,
            num_rows=pair.num_rows,
            p=p,
        )
        for pair, p in zip(family, corrected, strict=True)
    ]
