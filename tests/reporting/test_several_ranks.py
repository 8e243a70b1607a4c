"""Cells of several ranks: bytes are those of one rank, compared at equal ranks."""

import re

from meft_reports.frame import to_frame
from meft_reports.page import render_page
from meft_reports.tables import find_tables
from reporting.kinds import MakeRecord, Record

MIB = 2**20


def cells(make_record: MakeRecord) -> list[Record]:
    """A peak for each method and number of ranks."""
    found = []
    for method, ranks, size in (
        ("full", 1, 132),
        ("full", 2, 82),
        ("meft1-exact", 1, 94),
        ("meft1-exact", 2, 47),
    ):
        record = make_record(
            method=method, task="synthetic", peak_allocated_bytes=size * MIB, score=None
        )
        record["cell"] |= {"ranks": ranks, "parallel": "ddp"}
        record["cell_id"] += f"/ranks={ranks}"
        found.append(record)
    return found


def test_ranks_are_another_workload_on_the_page(make_record: MakeRecord) -> None:
    page = render_page(to_frame(cells(make_record))).decode()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "2 ranks, ddp" in text
    # 35 % less would be the mean of 47 and 94 against that of 82 and 132.
    assert "35 % less" not in text


def test_ranks_are_not_averaged_in_tables(make_record: MakeRecord) -> None:
    for name in ("memory", "savings"):
        tables = find_tables(name)(to_frame(cells(make_record)))
        text = " ".join(map(str, tables))
        assert "70.5 MiB" not in text
        assert "2 ranks" in text
