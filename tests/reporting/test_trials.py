"""Which values trials have chosen, and whether others beyond them were not tried."""

from typing import Any

import pytest

from meft_reports.frame import to_frame
from meft_reports.tables import find_tables
from reporting.kinds import MakeRecord

OF_TRIALS: Any = {"scored_on": "validation", "seed": 1000, "task": "rte"}


def chosen(make_record: MakeRecord, rates: list[float], best: float) -> dict[str, str]:
    """The column `chosen` by method, of trials with some rates."""
    records = [
        make_record(learning_rate=rate, score=0.6, **OF_TRIALS) for rate in rates
    ]
    records.append(make_record(learning_rate=best, score=0.55, task="rte"))
    (table,) = find_tables("trials")(to_frame(records))
    return {row[0]: row[-1] for row in table.rows}


@pytest.mark.parametrize(
    ("best", "words"),
    [
        (1e-4, "yes, the smallest learning_rate tried"),
        (1e-3, "yes"),
        (1e-2, "yes, the largest learning_rate tried"),
    ],
)
def test_values_at_an_end(make_record: MakeRecord, best: float, words: str) -> None:
    found = chosen(make_record, [1e-4, 1e-3, 1e-2], best)
    assert list(found.values()).count("–") == 2  # noqa: RUF001
    assert words in found.values()


def test_two_values_are_both_ends(make_record: MakeRecord) -> None:
    """Of them it is not said."""
    assert "yes" in chosen(make_record, [1e-4, 1e-3], 1e-3).values()
