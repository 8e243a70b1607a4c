import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from meft_bench.shared.cell import Cell
from meft_bench.shared.measurement import FIELDS, Measurement
from meft_bench.shared.record import SCHEMA_VERSION, Environment, Record, Status
from meft_reports import columns
from meft_reports.columns.cell import STATUSES
from meft_reports.errors import RecordError, UnknownName
from meft_reports.frame import (
    read_frame,
    to_frame,
)
from meft_reports.frame_files import load_frame, save_frame
from reporting.kinds import MakeRecord, Write


def test_every_field_of_a_record_has_a_column() -> None:
    """What the harness writes down, a reader of the frame can find.

    But for `memory_breakdown`, which is a table of its own (`breakdowns_of`), and for
    `aliases`, which columns of the cell show (`with_aliases`).
    """
    fields = {"cell_id", *FIELDS}
    for part in (Cell, Environment, Record):
        fields |= {field.name for field in dataclasses.fields(part)}
    parts = {"cell", "measurement", "environment", "memory_breakdown", "aliases"}
    assert fields - parts <= columns.BY_NAME.keys()
    assert columns.SCHEMA_VERSION == SCHEMA_VERSION
    assert set(STATUSES) == {status.value for status in Status}


def test_a_record_that_the_harness_wrote_can_be_read(write: Write) -> None:
    """The file is the whole interface, and both sides agree on it."""
    record = Record(
        sweep="gate",
        cell=Cell(method="meft1", depth=2, dtype="bf16"),
        status=Status.OK,
        message="",
        started_at="2026-01-02T03:04:05Z",
        wall_seconds=3.5,
        measurement=Measurement(saved_bytes=2**40 + 1, loss_curve=[1.0, 0.5]),
        environment=Environment(
            versions={"torch": "2.13.0"},
            commit=None,
            dirty=None,
            code_sha256="ab",
            machine="Example CPU",
            platform="Linux",
            cpu="Example",
            num_threads=2,
            num_slots=1,
        ),
    )
    row = read_frame([write([record.to_json()])]).iloc[0]
    assert row["cell_id"] == record.cell.id
    assert row["method"] == "meft1"
    assert row["saved_bytes"] == 2**40 + 1
    assert row["loss_curve"] == [1.0, 0.5]
    assert row["torch_version"] == "2.13.0"
    assert row["source"] == "measured"
    assert pd.isna(row["score"])


def test_the_frame_has_the_declared_columns_and_dtypes(frame: pd.DataFrame) -> None:
    """The table of facts is the truth about the frame."""
    assert list(frame.columns) == [column.name for column in columns.COLUMNS]
    for column in columns.COLUMNS:
        expected = "object" if column.dtype == "list" else column.dtype
        assert str(frame[column.name].dtype) == expected, column.name


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_is_kept(make_record: MakeRecord, status: str) -> None:
    """A cell that failed is a row like any other."""
    frame = to_frame([make_record(status)])
    assert frame["status"].tolist() == [status]


@pytest.mark.parametrize("name", ["cells.parquet", "cells.csv"])
def test_a_file_gives_the_same_frame_back(
    frame: pd.DataFrame, tmp_path: Path, name: str
) -> None:
    """Parquet and CSV lose nothing: values, nulls, lists and dtypes."""
    save_frame(frame, tmp_path / name)
    pd.testing.assert_frame_equal(load_frame(tmp_path / name), frame, check_exact=True)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_records_are_read_whatever_ends_their_lines(
    end: bytes, mark: bytes, make_record: MakeRecord, write: Write
) -> None:
    """With a byte-order mark, blank lines and no last newline: as an editor left it."""
    path = write([make_record(seed=seed, message="a\u2028b") for seed in (0, 1)])
    first, second = path.read_bytes().splitlines()
    path.write_bytes(mark + first + end + end + b" " + end + second)
    assert list(read_frame([path])["seed"]) == [0, 1]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_frame_of_csv_is_read_as_other_programs_write_it(
    end: str, mark: str, make_record: MakeRecord, tmp_path: Path
) -> None:
    """Quotes, commas and newlines in a message; a mark and a blank line in the file."""
    text = 'say "no", twice\nand\u2028again'
    frame = to_frame([make_record("error", message=text)])
    save_frame(frame, tmp_path / "cells.csv")
    content = (tmp_path / "cells.csv").read_text(encoding="utf-8")
    header, _, rest = content.partition("\n")
    path = tmp_path / "other.csv"
    path.write_bytes((mark + header + end + rest.rstrip("\n") + end + end).encode())
    pd.testing.assert_frame_equal(load_frame(path), frame, check_exact=True)


def test_parquet_is_typed_for_any_reader(frame: pd.DataFrame, tmp_path: Path) -> None:
    """pandas alone sees integers for bytes, also where every value is null."""
    save_frame(frame, tmp_path / "cells.parquet")
    plain = pd.read_parquet(tmp_path / "cells.parquet")
    assert str(plain["saved_bytes"].dtype) == "Int64"
    assert str(plain["pcie_rx_bytes"].dtype) == "Int64"


def test_parquet_says_what_its_columns_mean(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    """The unit and the meaning of `columns`, which the page's legend has too."""
    save_frame(frame, tmp_path / "cells.parquet")
    schema = pq.read_schema(tmp_path / "cells.parquet")
    for column in columns.COLUMNS:
        found = schema.field(column.name).metadata
        unit = {b"unit": column.unit.encode()} if column.unit else {}
        assert found.items() >= {b"meaning": column.meaning.encode(), **unit}.items()
        assert (b"unit" in found) == bool(column.unit)
    saved = schema.field("saved_bytes").metadata
    assert saved[b"unit"] == b"bytes"
    assert saved[b"meaning"].startswith(b"One training forward pass keeps")


def test_pandas_reads_the_frame_that_was_written(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    """Metadata of columns changes no value and no dtype; lists are arrays there."""
    save_frame(frame, tmp_path / "cells.parquet")
    plain = pd.read_parquet(tmp_path / "cells.parquet")
    lists = [c.name for c in columns.COLUMNS if c.dtype == "list"]
    pd.testing.assert_frame_equal(
        plain.drop(columns=lists), frame.drop(columns=lists), check_exact=True
    )
    for name in lists:
        for found, expected in zip(plain[name], frame[name], strict=True):
            assert (found is None) == (expected is None)
            assert expected is None or [*found] == pytest.approx(expected, nan_ok=True)


def test_a_file_ends_in_parquet_or_csv(frame: pd.DataFrame, tmp_path: Path) -> None:
    """Another ending is refused, with the nearest one, and nothing is written."""
    with pytest.raises(UnknownName, match=r"'\.parket'.*did you mean '\.parquet'"):
        save_frame(frame, tmp_path / "cells.parket")
    assert list(tmp_path.iterdir()) == []


def test_files_are_read_together_in_any_order(
    make_record: MakeRecord, write: Write
) -> None:
    """The frame does not depend on the order of files or lines."""
    one = write([make_record(seed=1), make_record(seed=0)], "one.jsonl")
    two = write([make_record(seed=2)], "two.jsonl")
    pd.testing.assert_frame_equal(read_frame([one, two]), read_frame([two, one]))


def test_a_torn_last_line_is_left_out_and_said(
    make_record: MakeRecord, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill in the middle of a write costs that record and no other."""
    path = write([make_record(seed=0)])
    whole = json.dumps(make_record(seed=1, machine="Rechner ä"), ensure_ascii=False)
    for cut in (1, 200, whole.encode().index("ä".encode()) + 1):
        path.write_bytes(
            (json.dumps(make_record(seed=0)) + "\n").encode() + whole.encode()[:cut]
        )
        assert len(read_frame([path])) == 1
        assert f"{path}, line 2: torn" in capsys.readouterr().err


def test_a_last_line_without_newline_counts_if_it_is_whole(
    make_record: MakeRecord, write: Write
) -> None:
    """A missing newline alone loses nothing."""
    path = write([make_record(seed=0), make_record(seed=1)])
    path.write_text(path.read_text().rstrip("\n"))
    assert len(read_frame([path])) == 2


def test_a_broken_line_in_the_middle_is_an_error(
    make_record: MakeRecord, write: Write
) -> None:
    """Only the last line can have been torn; any other is named."""
    path = write([make_record(seed=0), make_record(seed=1)])
    path.write_text("{\n" + path.read_text())
    with pytest.raises(RecordError, match=r"run\.jsonl, line 1: not JSON"):
        read_frame([path])


def _without(record: Any, section: str, field: str) -> Any:
    del record[section][field]
    return record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r | {"schema_version": 1}, "line 1: schema version 1, expected 2"),
        (lambda r: {}, "line 1: schema version None, expected 2"),
        (lambda r: [1], r"line 1: expected a JSON object, got \[1\]"),
        (lambda r: r | {"cell": None}, "line 1: `cell` is missing or not an object"),
        (lambda r: r | {"status": "fine"}, "line 1: unknown status 'fine'"),
        (lambda r: _without(r, "cell", "method"), "line 1: `cell.method` is missing"),
        (
            lambda r: _without(r, "environment", "versions"),
            "line 1: `environment.versions` is not an object",
        ),
        (
            lambda r: r | {"measurement": {"saved_bytes": 1.5}},
            "`measurement.saved_bytes` should be a 64-bit integer, got 1.5",
        ),
        (
            lambda r: r | {"measurement": {"saved_bytes": True}},
            "`measurement.saved_bytes` should be a 64-bit integer, got True",
        ),
        (
            lambda r: r | {"measurement": {"saved_bytes": 2**63}},
            "`measurement.saved_bytes` should be a 64-bit integer",
        ),
        (
            lambda r: r | {"measurement": {"loss_curve": ["1"]}},
            "`measurement.loss_curve` should be a list of numbers",
        ),
    ],
)
def test_what_is_not_a_record_is_refused_by_name(
    make_record: MakeRecord, write: Write, change: Callable[[Any], Any], message: str
) -> None:
    """The error says which file, which line, which field, and what was expected."""
    with pytest.raises(RecordError, match=message) as error:
        read_frame([write([change(make_record())])])
    assert "\n" not in str(error.value)


def test_a_missing_file_and_an_empty_one_are_errors(
    tmp_path: Path, write: Write
) -> None:
    """There is no frame without records."""
    with pytest.raises(RecordError, match=r"cannot read .*absent\.jsonl"):
        read_frame([tmp_path / "absent.jsonl"])
    with pytest.raises(RecordError, match="holds no record"):
        read_frame([write([])])


def test_fields_of_a_newer_harness_are_named_and_ignored(
    make_record: MakeRecord, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader that knows less says so, and reads the rest."""
    record = make_record(score=0.5)
    record["measurement"]["energy_joules"] = 3.0
    assert read_frame([write([record])])["score"].tolist() == [0.5]
    assert "measurement.energy_joules" in capsys.readouterr().err


def test_texts_are_printable_and_bounded(make_record: MakeRecord) -> None:
    """Line breaks, reversed reading, lone surrogates and megabytes end at the door."""
    message = "a\nb \u202e \ud800 \x1b[31m" + "x" * 10**6
    row = to_frame([make_record("error", message=message)]).iloc[0]
    assert row["message"].startswith(r"a\nb \u202e \ud800 \x1b[31mxxx")
    assert "… [999,0" in row["message"]
    assert len(row["message"]) < 1100
    assert row["message"].isprintable()


def test_long_names_that_begin_alike_remain_two(make_record: MakeRecord) -> None:
    """A cell's name is its key, also where it is cut."""
    one, other = make_record(), make_record()
    one["cell_id"], other["cell_id"] = "x" * 5000 + "1", "x" * 5000 + "2"
    assert to_frame([one, other])["cell_id"].nunique() == 2


def test_two_cells_with_one_printable_name_are_an_error(
    make_record: MakeRecord,
) -> None:
    """One of the two would stand for both."""
    one, other = make_record(), make_record()
    one["cell_id"], other["cell_id"] = "a\n", r"a\n"
    with pytest.raises(RecordError, match="two cells are both shown as"):
        to_frame([one, other])


@pytest.mark.parametrize("space", ["", " ", "  "])
@pytest.mark.parametrize(
    "text",
    ["=1+1", "+1", "-1", "@SUM(A1)", "'=1", "a=1", "＝1+1", "＋1", "－1", "＠SUM(A1)"],  # noqa: RUF001
)
def test_a_spreadsheet_takes_no_text_for_a_formula(
    make_record: MakeRecord, tmp_path: Path, text: str, space: str
) -> None:
    """No field of the CSV begins like one, also behind spaces, and reading it back
    gives the text again."""
    text = space + text
    frame = to_frame([make_record("error", message=text)])
    save_frame(frame, tmp_path / "cells.csv")
    with (tmp_path / "cells.csv").open(newline="") as file:
        _, fields = csv.reader(file)
    starts = tuple("=+@-＝＋＠－")  # noqa: RUF001
    assert not any(field.lstrip().startswith(starts) for field in fields)
    assert load_frame(tmp_path / "cells.csv")["message"].tolist() == [text]


@pytest.mark.parametrize(
    ("name", "loss_mean", "wanted"),
    [
        ("exact_match", None, "contains"),
        ("exact_match_any_case", None, "contains_any_case"),
        ("number", None, "last_number"),
        ("exact_match", "tokens", "exact_match"),
        ("accuracy", None, "accuracy"),
    ],
)
def test_scores_of_older_code_have_the_name_of_their_rule(
    name: str, loss_mean: str | None, wanted: str, make_record: MakeRecord
) -> None:
    """What it called exact match was containment, and would be taken for another."""
    frame = to_frame([make_record(score_name=name, loss_mean=loss_mean)])
    assert list(frame["score_name"]) == [wanted]


def test_the_published_answers_are_read_by_the_name_of_their_rule() -> None:
    """NQ-open's are containment; ARC's rule has not changed."""
    path = Path(__file__).parents[2] / "reports" / "published" / "knowledge"
    frame = read_frame([path / "records.jsonl.gz"])
    names = frame.groupby("task")["score_name"].unique()
    assert {task: list(found) for task, found in names.items()} == {
        "arc-easy": ["options"],
        "nq-open": ["contains"],
    }
