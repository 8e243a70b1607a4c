"""What MEFT's methods are compared with at equal memory."""

import pytest

from meft_reports.frame import to_frame
from meft_reports.tables import find_tables
from reporting.kinds import MakeRecord, equal_memory


def test_the_best_rival_takes_no_more_memory(make_record: MakeRecord) -> None:
    (table,) = find_tables("rivals")(to_frame(equal_memory(make_record)))
    (row,) = table.rows
    found = dict(zip(table.header, row, strict=True))
    assert found["method"] == "meft1-exact"
    assert (found["score"], found["peak allocated"]) == ("0.743", "100.0 MiB")
    assert found["less full"] == "-0.123"
    assert found["best rival"] == "lora-checkpointing"
    assert (found["its score"], found["its peak"]) == ("0.667", "104.0 MiB")
    assert found["less it"] == "+0.077"
    low, high = map(float, found["its interval"].split(" to "))
    assert (low + high) / 2 == pytest.approx(0.077, abs=1e-3)


def test_where_no_rival_fits_only_full_is_compared(make_record: MakeRecord) -> None:
    records = [
        record
        for record in equal_memory(make_record)
        if record["cell"]["method"] in ("full", "meft1-exact")
    ]
    (table,) = find_tables("rivals")(to_frame(records))
    assert table.rows[0][3] == "-0.123"
    assert set(table.rows[0][5:]) == {"–"}  # noqa: RUF001


def test_rivals_alone_make_no_table(make_record: MakeRecord) -> None:
    records = [
        record
        for record in equal_memory(make_record)
        if record["cell"]["method"] != "meft1-exact"
    ]
    assert find_tables("rivals")(to_frame(records)) == []


@pytest.mark.parametrize(
    "other", [{"weights_sha256": "b" * 64}, {"data_origin": "other rows"}]
)
def test_scores_of_other_weights_or_rows_are_not_compared(
    make_record: MakeRecord, other: dict[str, str]
) -> None:
    """Neither in the table nor in a difference; the titles say what differs."""
    records = equal_memory(make_record)
    for record in records:
        record["environment"] |= {"weights_sha256": "a" * 64, "data_origin": "rows"}
        if record["cell"]["method"] == "lora-checkpointing":
            record["environment"] |= other
    tables = find_tables("rivals")(to_frame(records))
    assert all("lora-checkpointing" not in row for t in tables for row in t.rows)
