from typing import Any

import pytest

from marks import slow_but_for
from meft_reports.frame import read_frame
from meft_reports.tables import find_tables
from reporting.kinds import Cli, MakeRecord, Write

OLD, NEW = "0a" * 32, "0b" * 32
HERE, THERE = "This CPU", "Another CPU"

# How a cell ended, with which code, on which machine; in the order in which it was run.
# The last entry is what counts.
HISTORIES: dict[str, tuple[list[tuple[str, str, str]], str]] = {
    "one record": ([("ok", NEW, HERE)], "ok"),
    "failed, then ok": ([("error", NEW, HERE), ("ok", NEW, HERE)], "ok"),
    "ok, then failed": ([("ok", NEW, HERE), ("oom", NEW, HERE)], "oom"),
    "two failures": ([("oom", NEW, HERE), ("killed", NEW, HERE)], "killed"),
    "ok with old code, then failed": ([("ok", OLD, HERE), ("oom", NEW, HERE)], "oom"),
    "failed with old code, then ok": ([("oom", OLD, HERE), ("ok", NEW, HERE)], "ok"),
    "retried after the code changed": (
        [("ok", OLD, HERE), ("timeout", NEW, HERE), ("ok", NEW, HERE)],
        "ok",
    ),
    "failed anew after a retry": (
        [("oom", NEW, HERE), ("ok", NEW, HERE), ("error", NEW, HERE)],
        "error",
    ),
    "back to code that had failed": (
        [("oom", OLD, HERE), ("ok", NEW, HERE), ("error", OLD, HERE)],
        "error",
    ),
    "back to code that then ended well": (
        [("oom", OLD, HERE), ("error", NEW, HERE), ("ok", OLD, HERE)],
        "ok",
    ),
    "failed on one of two machines": (
        [("error", NEW, HERE), ("ok", NEW, THERE)],
        "error",
    ),
    "failed on the other machine": ([("ok", NEW, HERE), ("oom", NEW, THERE)], "oom"),
    "retried on its machine": (
        [("error", NEW, HERE), ("ok", NEW, THERE), ("ok", NEW, HERE)],
        "ok",
    ),
    "failed on both": ([("error", NEW, HERE), ("oom", NEW, THERE)], "oom"),
    "failed elsewhere with old code": (
        [("error", OLD, HERE), ("ok", NEW, THERE)],
        "ok",
    ),
    "skipped elsewhere": ([("skipped", NEW, THERE), ("ok", NEW, HERE)], "ok"),
    "ok, then skipped": ([("ok", NEW, HERE), ("skipped", NEW, HERE)], "skipped"),
}
NAMES = pytest.mark.parametrize("name", HISTORIES)


def _records(make_record: MakeRecord, name: str) -> tuple[list[Any], str]:
    history, counts = HISTORIES[name]
    records = [
        make_record(
            status,
            started_at=f"2026-01-01T00:00:0{second}Z",
            code_sha256=code,
            machine=machine,
        )
        for second, (status, code, machine) in enumerate(history)
    ]
    return records, counts


@NAMES
def test_the_last_record_with_the_newest_code_counts(
    make_record: MakeRecord, write: Write, name: str
) -> None:
    """On each machine, and a failure on one of them before an ok on another."""
    records, counts = _records(make_record, name)
    for order in (records, records[::-1]):
        assert read_frame([write(order)])["status"].tolist() == [counts]


@NAMES
def test_every_reader_of_a_run_sees_the_same_record(
    make_record: MakeRecord, write: Write, name: str
) -> None:
    """The table of failures holds a cell if its record that counts is no ok one."""
    records, counts = _records(make_record, name)
    frame = read_frame([write(records)])
    shown = [row[1] for table in find_tables("failures")(frame) for row in table.rows]
    assert shown == ([] if counts == "ok" else [counts])


@pytest.mark.parametrize(
    "status",
    slow_but_for(["oom", "error", "timeout", "killed", "skipped"], "oom", "skipped"),
)
def test_a_cell_that_was_ok_with_older_code_does_not_pass(
    cli: Cli, make_record: MakeRecord, write: Write, status: str
) -> None:
    """It fails the check, is in the table of failures and on the page."""
    ok = make_record(started_at="2026-01-01T00:00:00Z", code_sha256=OLD)
    failed = make_record(status, started_at="2026-01-02T00:00:00Z", code_sha256=NEW)
    run, baseline = write([ok, failed]), write([ok], "baseline.jsonl")
    done = cli("check", run, "--baseline", baseline, "--fail-on", "saved:0")
    assert done.returncode == 4
    assert f"{status}: made-up {status}" in done.stdout
    assert f"made-up {status}" in cli("table", "failures", run).stdout


def test_of_records_of_one_second_the_later_line_counts(
    make_record: MakeRecord, write: Write
) -> None:
    """Also where the lines are in two files; time is known by the second."""
    ok, failed = make_record(), make_record("error")
    one, other = write([ok], "one.jsonl"), write([failed], "other.jsonl")
    assert read_frame([write([ok, failed])])["status"].tolist() == ["error"]
    assert read_frame([write([failed, ok])])["status"].tolist() == ["ok"]
    assert read_frame([one, other])["status"].tolist() == ["error"]
    assert read_frame([other, one])["status"].tolist() == ["ok"]


def test_times_are_compared_as_times(make_record: MakeRecord, write: Write) -> None:
    """In whatever form and zone they are written."""
    ok = make_record(started_at="2026-01-01T12:00:00+02:00")
    failed = make_record("error", started_at="2026-01-01T11:00:00Z")
    assert read_frame([write([failed, ok])])["status"].tolist() == ["error"]
    exact = make_record(started_at="2026-01-01T11:00:00.5Z")
    assert read_frame([write([exact, failed])])["status"].tolist() == ["ok"]


def test_the_newest_code_is_that_of_the_last_record_of_all_cells(
    make_record: MakeRecord, write: Write
) -> None:
    """Code that one cell went back to judges the other cells too.

    Of a cell that was not run with the code in between, the harness writes nothing
    when the code comes back.
    """
    records = [
        make_record(seed=0, code_sha256=OLD, started_at="2026-01-01T00:00:00Z"),
        make_record(seed=1, code_sha256=OLD, started_at="2026-01-01T00:00:01Z"),
        make_record("oom", seed=0, code_sha256=NEW, started_at="2026-01-01T00:00:02Z"),
        make_record("oom", seed=1, code_sha256=NEW, started_at="2026-01-01T00:00:03Z"),
        make_record(seed=1, code_sha256=OLD, started_at="2026-01-01T00:00:04Z"),
    ]
    frame = read_frame([write(records)])
    assert frame["status"].tolist() == ["ok", "ok"]
    assert frame["newest_code"].tolist() == [True, True]
    before = read_frame([write(records[:-1])])
    assert before["status"].tolist() == ["oom", "oom"]


def test_a_cell_without_the_newest_code_shows_what_it_ran_with_last(
    make_record: MakeRecord, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of several codes loses no cell, and says which are older."""
    oldest = "0c" * 32
    records = [
        make_record(seed=0, code_sha256=oldest, started_at="2026-01-01T00:00:00Z"),
        make_record("oom", seed=0, code_sha256=OLD, started_at="2026-01-01T00:00:01Z"),
        make_record(seed=1, code_sha256=NEW, started_at="2026-01-01T00:00:02Z"),
    ]
    frame = read_frame([write(records)])
    assert frame["status"].tolist() == ["oom", "ok"]
    assert frame["newest_code"].tolist() == [False, True]
    assert capsys.readouterr().err == (
        "note: left out 1 record of cells run again\n"
        "note: 1 cell ran with older code than 0b0b0b0b\n"
    )


def test_leaving_records_out_is_said(
    make_record: MakeRecord, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also that some of them are failures."""
    failed = make_record("oom", started_at="2026-01-01T00:00:00Z")
    ok = make_record(started_at="2026-01-03T00:00:00Z")
    read_frame([write([failed, ok])])
    assert capsys.readouterr().err == (
        "note: left out 1 record of cells run again, 1 of them failures\n"
    )
    read_frame([write([ok])])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("status", ["oom", "timeout", "killed", "error"])
def test_a_failure_counts_until_it_is_retried_on_its_machine(
    make_record: MakeRecord, write: Write, status: str
) -> None:
    """In whatever way it failed."""
    failed = make_record(status, started_at="2026-01-01T00:00:00Z", machine=HERE)
    elsewhere = make_record(started_at="2026-01-02T00:00:00Z", machine=THERE)
    retried = make_record(started_at="2026-01-03T00:00:00Z", machine=HERE)
    assert read_frame([write([failed, elsewhere])])["status"].tolist() == [status]
    run = write([failed, elsewhere, retried])
    assert read_frame([run])["status"].tolist() == ["ok"]
