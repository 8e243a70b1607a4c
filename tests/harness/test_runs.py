import dataclasses
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from meft_bench.parent import runs
from meft_bench.parent.runs import RecordsFile, RunsError
from meft_bench.shared.cell import Cell
from meft_bench.shared.measurement import Measurement
from meft_bench.shared.record import Environment, Record, Status


@pytest.fixture
def records(here: Environment) -> list[Record]:
    """Three records; one has text that is not ASCII, the next is longer than most."""
    return [
        Record(
            sweep="a sweep",
            cell=Cell(method="full", seed=seed),
            status=Status.OK,
            message=("naïve, in µ", "long " * 200, "")[seed],
            started_at="2025-01-01T00:00:00+00:00",
            wall_seconds=1.5,
            measurement=Measurement(saved_bytes=seed, loss_curve=[0.1, 0.2]),
            environment=here,
        )
        for seed in range(3)
    ]


def test_round_trip(tmp_path: Path, records: list[Record]) -> None:
    """Records come back as they were written, oldest first, one line each."""
    path = tmp_path / "new" / "folder" / "runs.jsonl"
    with RecordsFile(path) as file:
        for record in records:
            file.append(record)
    assert runs.read(path) == records
    lines = path.read_text().splitlines()
    assert [json.loads(line)["cell_id"] for line in lines] == [
        record.cell.id for record in records
    ]


def test_no_file(tmp_path: Path) -> None:
    """Where there is no file there are no records, and reading makes none."""
    assert runs.read(tmp_path / "runs.jsonl") == []
    assert list(tmp_path.iterdir()) == []


def test_a_whole_last_line_needs_no_newline(
    tmp_path: Path, records: list[Record]
) -> None:
    """As some editors leave it; the next record begins a line of its own."""
    path = tmp_path / "runs.jsonl"
    with RecordsFile(path) as file:
        file.append(records[0])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert len(runs.read(path)) == 1
    with RecordsFile(path) as file:
        assert not file.is_torn
        assert len(file.records) == 1
        file.append(records[1])
        file.append(records[0])
    assert runs.read(path) == [records[0], records[1], records[0]]


@pytest.mark.parametrize("kept", [1, 0.5, -2])
def test_torn_line(tmp_path: Path, records: list[Record], kept: float) -> None:
    """What is left of a line is not read, and the next record takes its place.

    The line is cut after its first character, in its middle, and before its last brace.
    """
    path = tmp_path / "runs.jsonl"
    with RecordsFile(path) as file:
        file.append(records[0])
        first = path.read_bytes()
        file.append(records[1])
    second = path.read_bytes().removeprefix(first)
    cut = {1: 1, 0.5: len(second) // 2, -2: len(second) - 2}[kept]
    path.write_bytes(first + second[:cut])
    assert runs.read(path) == records[:1]
    with RecordsFile(path) as file:
        assert file.records == records[:1]
        assert file.is_torn
        assert path.read_bytes() == first + second[:cut]
        file.append(records[2])
    assert runs.read(path) == [records[0], records[2]]
    with RecordsFile(path) as file:
        assert not file.is_torn
    content = path.read_bytes()
    assert json.loads(content.removeprefix(first)) == records[2].to_json()


def test_a_write_that_stops_at_any_byte(tmp_path: Path, records: list[Record]) -> None:
    """The records before it are read, and it itself only if nothing of it is missing.

    Some of the cuts are inside of a character.
    """
    path = tmp_path / "runs.jsonl"
    with RecordsFile(path) as file:
        file.append(records[1])
        first = path.read_bytes()
        file.append(records[0])
    second = path.read_bytes().removeprefix(first)
    assert not second.isascii()
    for cut in range(len(second) + 1):
        path.write_bytes(first + second[:cut])
        is_whole = cut >= len(second) - 1  # but for its newline
        expected = [records[1], records[0]] if is_whole else [records[1]]
        assert runs.read(path) == expected
        if cut % 300 and cut < len(second) - 2:
            continue
        with RecordsFile(path) as file:
            assert file.records == expected
            assert file.is_torn == (0 < cut and not is_whole)
            file.append(records[2])
        assert runs.read(path) == [*expected, records[2]]


def test_a_clock_that_was_set_back(tmp_path: Path, records: list[Record]) -> None:
    """No record starts before one of an earlier run: reports take the one that started
    last."""
    path = tmp_path / "runs.jsonl"
    late, early = (
        dataclasses.replace(records[0], started_at=f"{year}-01-01T00:00:00+00:00")
        for year in (2031, 2030)
    )
    with RecordsFile(path) as file:
        assert file.newest == ""
        file.append(early)
        file.append(late)
        file.append(early)  # of one run, each as it is
    with RecordsFile(path) as file:
        assert file.newest == late.started_at
        assert file.is_ahead == (datetime.now(UTC).year < 2031)
        file.append(early)
    assert runs.read(path) == [early, late, early, late]


def test_a_blank_line_is_no_record(tmp_path: Path, records: list[Record]) -> None:
    """As an editor may leave it."""
    path = tmp_path / "runs.jsonl"
    with RecordsFile(path) as file:
        file.append(records[0])
    with path.open("a") as stream:
        stream.write("\n \r\n")
    with RecordsFile(path) as file:
        file.append(records[1])
    assert runs.read(path) == records[:2]


@pytest.mark.parametrize(
    "text",
    ["garbage", "[]", "{}", '{"schema_version": 1}', '{"status": 1, "status": 2}'],
)
def test_bad_line(tmp_path: Path, records: list[Record], text: str) -> None:
    """A whole line that is no record is reported by number; nothing is changed."""
    path = tmp_path / "runs.jsonl"
    with RecordsFile(path) as file:
        file.append(records[0])
    with path.open("a") as stream:
        stream.write(text + "\n")
    content = path.read_bytes()
    with pytest.raises(RunsError, match=r"runs.jsonl: line 2 is not a record \(.+\)"):
        runs.read(path)
    with pytest.raises(RunsError, match="line 2"):
        RecordsFile(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("", "wall_seconds", "x"),
        ("", "wall_seconds", None),
        ("", "wall_seconds", True),
        ("", "sweep", None),
        ("", "started_at", 3),
        ("", "status", []),
        ("", "measurement", []),
        ("cell", "method", ["full"]),
        ("cell", "batch_size", {}),
        ("cell", "seed", 1.5),
        ("measurement", "saved_bytes", "many"),
        ("measurement", "loss_curve", [[1.0]]),
        ("environment", "versions", {"torch": 2}),
        ("environment", "num_slots", None),
        ("", "schema_version", 2.0),
        ("", "schema_version", True),
    ],
)
def test_a_value_of_another_type_is_one_line(
    tmp_path: Path, records: list[Record], section: str, name: str, value: object
) -> None:
    """It names the file, the line and the field."""
    fields = json.loads(json.dumps(records[0].to_json()))
    (fields[section] if section else fields)[name] = value
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(fields) + "\n")
    what = "schema version" if name == "schema_version" else f"`{name}` = "
    with pytest.raises(RunsError, match=rf"line 1 is not a record \(.*{what}.*\)"):
        runs.read(path)


def test_a_line_of_nested_lists_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(RunsError, match="line 1 is not a record"):
        runs.read(path)


def test_a_name_that_is_twice_in_a_record(
    tmp_path: Path, records: list[Record]
) -> None:
    """JSON leaves open which of the two counts, so neither does."""
    path = tmp_path / "runs.jsonl"
    text = json.dumps(records[0].to_json())
    path.write_text(
        text.replace('"saved_bytes"', '"saved_bytes": 5, "saved_bytes"') + "\n"
    )
    with pytest.raises(
        RunsError, match=r"line 1 .*'saved_bytes' is in one object twice"
    ):
        runs.read(path)


def test_unusable_path(tmp_path: Path) -> None:
    """A path that cannot be a file is reported, with the reason."""
    with pytest.raises(RunsError, match="Is a directory"):
        RecordsFile(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunsError, match=r"file: File exists"):
        RecordsFile(tmp_path / "file" / "runs.jsonl")


def test_lock(tmp_path: Path) -> None:
    """Two runs never write to one file; the second's message says what to do."""
    path = tmp_path / "runs.jsonl"
    with (
        RecordsFile(path),
        pytest.raises(RunsError, match="another run is writing to it, ") as caught,
    ):
        RecordsFile(path)
    assert str(path) in str(caught.value)
    assert f"process {os.getpid()} (`" in str(caught.value)  # who holds it
    assert "\n" not in str(caught.value)
    RecordsFile(path).close()


def test_lock_of_nobody_who_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a process on another machine, or where the system does not tell."""
    path = tmp_path / "runs.jsonl"
    monkeypatch.setattr(runs, "_files", lambda process: iter(()))
    with RecordsFile(path), pytest.raises(RunsError, match="writing to it; wait for"):
        RecordsFile(path)


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    """A killed run does not leave the file locked."""
    path = tmp_path / "runs.jsonl"
    program = (
        "import os, pathlib, signal, sys\n"
        "from meft_bench.parent.runs import RecordsFile\n"
        "file = RecordsFile(pathlib.Path(sys.argv[1]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(path)])
    assert ended.returncode == -9
    assert path.exists()
    RecordsFile(path).close()


def test_done(records: list[Record], here: Environment) -> None:
    """A cell is done once its last comparable record is ok."""
    cells = [record.cell for record in records]
    assert list(runs.done(records, cells, {"cpu": here}).values()) == records
    assert set(runs.done(records, cells[1:], {"cpu": here})) == set(cells[1:])
    failed = dataclasses.replace(records[0], status=Status.OOM)
    assert set(runs.done([*records, failed], cells, {"cpu": here})) == set(cells[1:])
    assert set(runs.done([failed, *records], cells, {"cpu": here})) == set(cells)


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.OK])
def test_only_ok_is_done(records: list[Record], status: Status) -> None:
    """No other status spares a cell from running again."""
    record = dataclasses.replace(records[0], status=status)
    assert runs.done([record], [record.cell], {"cpu": record.environment}) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"code_sha256": "other"},
        {"machine": "another machine"},
        {"versions": {"torch": "2.14.0"}},
        {"versions": {"torch": "2.13.0", "transformers": "5.24.0"}},
        {"versions": {}},
    ],
)
def test_done_elsewhere(
    records: list[Record], here: Environment, change: dict[str, object]
) -> None:
    """A record from other code, another machine or other packages does not count."""
    elsewhere = dataclasses.replace(here, **change)  # type: ignore[arg-type]
    cells = [record.cell for record in records]
    assert runs.done(records, cells, {"cpu": elsewhere}) == {}


def test_a_failure_on_another_machine_undoes_nothing_here(
    records: list[Record], here: Environment
) -> None:
    """With the same code: reports keep the records of both machines."""
    elsewhere = dataclasses.replace(here, machine="another machine")
    cells = [record.cell for record in records]
    failed = dataclasses.replace(records[0], status=Status.ERROR, environment=elsewhere)
    assert set(runs.done([*records, failed], cells, {"cpu": here})) == set(cells)


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize(
    "change",
    [
        {"code_sha256": "other"},
        {"code_sha256": "other", "machine": "another machine"},
        {"versions": {"torch": "2.14.0"}},
    ],
)
def test_what_ran_with_other_code_since_runs_again(
    records: list[Record],
    here: Environment,
    status: Status,
    change: dict[str, object],
) -> None:
    """However it ended: a gate after the code came back must not judge the record in
    between, and an older record of the same code is no longer the last one."""
    elsewhere = dataclasses.replace(here, **change)  # type: ignore[arg-type]
    since = dataclasses.replace(records[0], status=status, environment=elsewhere)
    cells = [record.cell for record in records]
    assert set(runs.done([*records, since], cells, {"cpu": here})) == set(cells[1:])
    again = [*records, since, records[0]]
    assert set(runs.done(again, cells, {"cpu": here})) == set(cells)


def test_text_of_others_is_not_taken_for_half_a_record(tmp_path: Path) -> None:
    """Half a record begins as a record does; other text is not erased."""
    path = tmp_path / "notes.txt"
    path.write_text("notes of mine")
    with pytest.raises(RunsError, match="line 1"):
        RecordsFile(path)
    assert path.read_text() == "notes of mine"
