from typing import Any

import pandas as pd
import pytest

from meft_reports.frame import to_frame
from meft_reports.summary import spread, summarise, with_blocks_known
from reporting.kinds import MakeRecord


def test_seeds_are_averaged_and_counted(make_record: MakeRecord) -> None:
    """Two seeds give one row: mean, sample deviation, and how many."""
    records = [make_record(seed=s, score=v) for s, v in ((0, 0.8), (1, 0.9))]
    row = summarise(to_frame(records), ["score"]).iloc[0]
    assert row["score"] == pytest.approx(0.85, abs=1e-15)
    assert row["score_spread"] == pytest.approx(0.1 / 2**0.5)
    assert row["num_seeds"] == 2


def test_one_seed_has_no_spread(make_record: MakeRecord) -> None:
    """A spread of zero would claim a certainty that nobody measured."""
    row = summarise(to_frame([make_record()]), ["score"]).iloc[0]
    assert pd.isna(row["score_spread"])
    assert spread([1.0]) is None


@pytest.mark.parametrize(
    "place",
    [
        {"machine": "Another CPU"},
        {"code_sha256": "cc" * 32},
        {"versions": {"torch": "2.14.0"}},
        {"num_threads": 2},
        {"num_slots": 2},
    ],
)
def test_two_places_are_never_averaged(
    make_record: MakeRecord, place: dict[str, Any]
) -> None:
    """Records of two machines, codes, versions or loads stay two rows."""
    records = [make_record(seed=0), make_record(seed=1, **place)]
    assert summarise(to_frame(records), ["score"])["num_seeds"].tolist() == [1, 1]


@pytest.mark.parametrize("option", [{"learning_rate": 1e-5}, {"dtype": "bf16"}])
def test_two_settings_are_never_averaged(
    make_record: MakeRecord, option: dict[str, Any]
) -> None:
    """Only the seed may differ between records of one mean."""
    records = [make_record(seed=0), make_record(seed=1, **option)]
    assert len(summarise(to_frame(records), ["score"])) == 2


def test_a_failed_seed_is_counted_not_averaged(make_record: MakeRecord) -> None:
    """It joins its siblings although it could not name its torch any more."""
    records = [
        make_record(seed=0, score=0.8),
        make_record("oom", seed=1, versions={}),
    ]
    row = summarise(to_frame(records), ["score"]).iloc[0]
    assert (row["num_seeds"], row["num_failed"], row["score"]) == (1, 1, 0.8)


def test_a_failed_cell_takes_its_depth_from_what_it_asked_for(
    make_record: MakeRecord,
) -> None:
    """Or from a sibling of the same backbone, if it asked for none."""
    records = [
        make_record("oom", depth=32),
        make_record("oom", seed=1),
        make_record(seed=2, num_blocks=6),
    ]
    frame = with_blocks_known(to_frame(records))
    assert sorted(frame["num_blocks"]) == [6, 6, 32]
