from typing import Any

import pandas as pd
import pytest

from meft_reports.frame import to_frame
from meft_reports.labels import describe, fields_to_show
from meft_reports.summary import (
    WORKLOAD,
    prepare,
    split,
    spread,
    summarise,
    with_blocks_known,
)
from reporting.kinds import MakeRecord, Record


def test_seeds_are_averaged_and_counted(make_record: MakeRecord) -> None:
    """Two seeds give one row: mean, sample deviation, and how many."""
    records = [make_record(seed=s, score=v) for s, v in ((0, 0.8), (1, 0.9))]
    row = summarise(to_frame(records), ["score"]).iloc[0]
    assert row["score"] == pytest.approx(0.85, abs=1e-15)
    assert row["score_spread"] == pytest.approx(0.1 / 2**0.5)
    assert row["num_seeds"] == 2


def test_one_seed_has_no_spread(make_record: MakeRecord) -> None:
    """A spread of zero would claim a certainty that was not measured."""
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


def test_options_that_a_method_does_not_use_do_not_split_it(
    make_record: MakeRecord,
) -> None:
    """k is nothing to full fine-tuning: two such cells of one seed are one."""
    records = [make_record(lost_bits=k, seed=s) for k in (2, 4) for s in (0, 1)]
    row = summarise(to_frame(records), ["score"]).iloc[0]
    assert row["num_seeds"] == 2
    assert pd.isna(row["lost_bits"])
    exact = [make_record(method="meft1-exact", lost_bits=k) for k in (2, 4)]
    assert summarise(to_frame(exact), ["score"])["lost_bits"].tolist() == [2, 4]


def test_of_equal_cells_the_one_that_ended_well_is_left(
    make_record: MakeRecord,
) -> None:
    """Whichever stands first."""
    for statuses in (["oom", "ok"], ["ok", "oom"]):
        records = [
            make_record(status, lost_bits=k)
            for k, status in zip((2, 4), statuses, strict=True)
        ]
        assert prepare(to_frame(records))["status"].tolist() == ["ok"]


@pytest.mark.parametrize("name", ["weights_dtype", "attention", "blocks"])
def test_what_decides_a_comparison_is_never_averaged(
    make_record: MakeRecord, name: str
) -> None:
    """Weights, kernel and compilation are part of a workload."""
    records = [make_record(seed=0), make_record(seed=1, **{name: "another"})]
    assert len(summarise(to_frame(records), ["score"])) == 2
    titles = {describe(part, fields_to_show(part, ())) for part in _split(records)}
    assert any("another" in title for title in titles)


def _split(records: list[Record]) -> list[pd.DataFrame]:
    rows = prepare(to_frame(records))
    return [part for _, part in split(rows, WORKLOAD)]


def test_usual_values_go_without_saying(make_record: MakeRecord) -> None:
    """Unless there is another value."""
    usual, other = make_record(), make_record(weights_dtype="bf16")
    rows = prepare(to_frame([usual]))
    assert "weights" not in describe(rows, fields_to_show(rows, WORKLOAD))
    both = prepare(to_frame([usual, other]))
    shown = fields_to_show(both, WORKLOAD)
    titles = [describe(part, shown) for _, part in split(both, WORKLOAD)]
    assert ["bf16 weights" in titles[0], "fp32 weights" in titles[1]] == [True, True]


def test_a_null_in_a_record_loses_no_row(make_record: MakeRecord) -> None:
    """An older record lacks a field, or holds null in it: both mean the default."""
    record = make_record(method="meft1-exact", seed=0)
    record["cell"]["lost_bits"] = record["cell"]["reference"] = None
    rows = to_frame([record, make_record(method="meft1-exact", seed=1)])
    assert summarise(rows, ["score"])["num_seeds"].tolist() == [2]


def test_a_failed_seed_is_counted_not_averaged(make_record: MakeRecord) -> None:
    """It joins its siblings although it could not name its torch any more."""
    records = [
        make_record(seed=0, score=0.8),
        make_record("oom", seed=1, versions={}),
    ]
    row = summarise(to_frame(records), ["score"]).iloc[0]
    assert (row["num_seeds"], row["num_failed"], row["score"]) == (1, 1, 0.8)


def test_a_failed_cell_takes_its_depth_from_its_request(
    make_record: MakeRecord,
) -> None:
    """Or from a sibling of the same backbone, if it requested none."""
    records = [
        make_record("oom", depth=32),
        make_record("oom", seed=1),
        make_record(seed=2, num_blocks=6),
    ]
    frame = with_blocks_known(to_frame(records))
    assert sorted(frame["num_blocks"]) == [6, 6, 32]
