"""What a paper reports stands in a table of its own, with what was different."""

import csv
from pathlib import Path

from meft_reports.frame import to_frame
from meft_reports.methods import TABLE
from meft_reports.page.cells import comparable_cells
from meft_reports.page.papers import Reported, reported
from meft_reports.page.settings import settings_of
from meft_reports.page.workloads import workloads_of
from reporting.kinds import MakeRecord, Record
from reporting.pages import data_of, page_of

FILE = Path(__file__).parents[2] / "reports" / "meft_reports" / "papers.csv"
LLAMA = {"backbone": "random:llama-7b", "task": "synthetic-lm"}


def rows_for(records: list[Record]) -> list[Reported]:
    return reported(settings_of(comparable_cells(to_frame(records))))


def test_every_number_has_its_place_in_a_paper() -> None:
    rows = list(csv.DictReader(FILE.read_text().splitlines()))
    assert rows
    for row in rows:
        assert "arXiv" in row["source"]
        assert row["table"].startswith(("Table ", "Section "))
        assert row["method"] in TABLE
        assert float(row["value"]) > 0
        assert row["unit"]
        assert row["note"]


def test_the_same_backbone_and_method_are_shown(make_record: MakeRecord) -> None:
    """With the conditions there and here."""
    found = rows_for([make_record(method="sparse-experts", **LLAMA)])
    assert {row.method for row in found} == {"sparse-experts"}
    assert {row.backbone for row in found} == {"llama-7b"}
    (row,) = [row for row in found if row.task == "nq-open"]
    assert row.value == "0.413 (share)"
    assert "24 GB GPU; accumulated batch 64; 256 tokens" in row.there
    assert row.here == ("synthetic-lm, batch 16, 128 tokens, fp32, cpu, random weights")


def test_quantised_weights_are_told_apart(make_record: MakeRecord) -> None:
    """In the conditions of papers, and in the title of the workload."""
    record = make_record(method="sparse-experts", weights_dtype="nf4", **LLAMA)
    assert ", fp32, nf4 weights, cpu, " in rows_for([record])[0].here
    (workload,) = workloads_of(comparable_cells(to_frame([record]))).values()
    assert "nf4 weights" in workload.title


def test_another_backbone_or_method_is_not(make_record: MakeRecord) -> None:
    records = [make_record(method="meft1", **LLAMA), make_record(method="lora")]
    assert rows_for(records) == []
    assert "What the paper reports" not in page_of(to_frame(records))


def test_conditions_are_a_few(make_record: MakeRecord) -> None:
    records = [
        make_record(method="lora", seq_len=length, **LLAMA) for length in range(8, 13)
    ]
    assert all(row.here.endswith("; and 3 more") for row in rows_for(records))


def test_numbers_of_a_paper_are_in_no_data(make_record: MakeRecord) -> None:
    """They are in the table alone, of which no figure is made."""
    page = page_of(to_frame([make_record(method="lora", **LLAMA)]))
    assert "What the paper reports" in page
    assert "0.305" in page
    assert "0.305" not in str(data_of(page))
