import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meft_reports.cli import main
from meft_reports.columns import BY_NAME, COLUMNS, SCORE_NAMES
from meft_reports.errors import RecordError
from meft_reports.frame import read_frame
from meft_reports.records import read_baseline, read_records
from reporting.kinds import MakeRecord, Write

LIMIT = ("--fail-on", "saved:0")
SCORES = tuple(SCORE_NAMES)
IN_UNITS = [c for c in COLUMNS if c.unit and c.section != "derived"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(c.name, -1) for c in IN_UNITS if c.dtype == "Int64"],
        *[(c.name, -0.5) for c in IN_UNITS if c.dtype == "Float64"],
        *[(c.name, [1, -1]) for c in IN_UNITS if c.dtype == "list"],
        *[(name, 1.00001) for name in ("cache_hit_fraction", *SCORES)],
        ("union_fraction", [0.5, 1.5]),
        ("right_rows", [0, 2]),
        ("active_fraction", 2.0),
        ("step_seconds", 1e999),
        ("wall_seconds", 1e300),
        ("h2d_bytes", 2**61),
        ("batch_size", 2**60),
        *[(name, 0) for name in ("batch_size", "accumulation", "ranks")],
        ("guard_perplexity", 0.5),
        ("loss_curve", [1.0, 1e999]),
        ("learning_rate", 1e999),
    ],
)
def test_a_number_that_nothing_can_measure_is_an_error(
    make_record: MakeRecord, tmp_path: Path, field: str, value: Any
) -> None:
    """Negative bytes, more than all rows, infinite seconds: an error by name."""
    record = make_record()
    section = BY_NAME[field].section
    place = record[section] if section else record
    place[field] = value
    path = tmp_path / "run.jsonl"
    # JSON has no infinity, but a number too large to be anything else.
    path.write_text(json.dumps(record).replace("Infinity", "1e999") + "\n")
    with pytest.raises(RecordError, match=rf"line 1: `.*{field}` should be .*, got "):
        read_frame([path])


@pytest.mark.parametrize("correlation", ["matthews_correlation", "pearson", "spearman"])
@pytest.mark.parametrize("name", SCORES)
def test_what_a_score_can_be_depends_on_its_metric(
    make_record: MakeRecord, write: Write, name: str, correlation: str
) -> None:
    """Correlations may be negative, a share of right rows may not."""
    metric = SCORE_NAMES[name]
    known: Any = {"majority_score": 0.0, "score": 0.0, name: -0.5}
    matthews = make_record(**(known | {metric: correlation}))
    assert read_frame([write([matthews])])[name].tolist() == [-0.5]
    matthews["measurement"][name] = -1.5
    with pytest.raises(RecordError, match=f"`measurement.{name}` should be from -1 to"):
        read_frame([write([matthews])])
    for other in ("accuracy", None):
        record = make_record(**(known | {metric: other}))
        with pytest.raises(RecordError, match=r"should be from 0 to 1, got -0\.5"):
            read_frame([write([record])])


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (
            {"peak_allocated_bytes": 0, "model_state_bytes": 52642492},
            "`peak_activation_bytes` should be a finite number of at least 0, and of "
            "at most 1.15292e+18, got -52642492 from `peak_allocated_bytes` 0 and "
            "`model_state_bytes` 52642492",
        ),
        (
            {"num_trainable_parameters": 10**9 + 1, "num_parameters": 10**9},
            "`trainable_fraction` should be from 0 to 1, got 1.000000001 from",
        ),
        (
            {"h2d_bytes": 2**60, "d2h_bytes": 1},
            "`transfer_bytes` should be a finite number of at least 0, and of at most",
        ),
    ],
)
def test_numbers_that_contradict_each_other_are_an_error(
    make_record: MakeRecord, write: Write, seen: Any, message: str
) -> None:
    """Each alone could be measured; the gate would call such a peak an improvement."""
    path = write([make_record(**seen)])
    with pytest.raises(RecordError, match=re.escape(f"{path}, line 1: {message}")):
        read_frame([path])
    with pytest.raises(RecordError, match="line 1"):
        read_baseline(path)
    for name in seen:
        assert len(read_frame([write([make_record(**(seen | {name: None}))])])) == 1


def test_a_sum_over_ranks_is_at_least_the_number_of_one(
    make_record: MakeRecord, write: Write
) -> None:
    record = make_record(saved_bytes=10)
    record["measurement"]["sum_saved_bytes"] = 9
    message = "`measurement.sum_saved_bytes` should be at least `saved_bytes`, which is"
    with pytest.raises(RecordError, match=f"line 1: {message} 10, got 9"):
        read_frame([write([record])])


def test_the_bounds_themselves_can_be_measured(
    make_record: MakeRecord, write: Write
) -> None:
    """Nothing, everything, and a share that float32 has rounded."""
    record = make_record(
        h2d_bytes=0,
        score=1.0,
        majority_score=0.0,
        union_fraction=[0.0, 1.0 + 1e-7],
        gradient_error=[0.0, 1e30, None],
        start_deviation=32.0,
        step_seconds=0.0,
        num_trainable_parameters=22_000_000,
        peak_allocated_bytes=0,
        model_state_bytes=0,
    )
    assert len(read_frame([write([record])])) == 1


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_what_is_no_number_in_json_is_an_error(
    make_record: MakeRecord, tmp_path: Path, constant: str, end: str
) -> None:
    """Also in the last line, which may be torn, and where the field is unknown."""
    path = tmp_path / "run.jsonl"
    line = json.dumps(make_record(score=0.123)).replace("0.123", constant)
    path.write_text(json.dumps(make_record()) + "\n" + line + end)
    with pytest.raises(RecordError, match=f"line 2: {constant} is not a number"):
        read_frame([path])


@pytest.mark.parametrize("name", ["status", "saved_bytes", "torch"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_name_that_is_twice_in_an_object_is_an_error(
    make_record: MakeRecord, tmp_path: Path, name: str, end: str
) -> None:
    """Readers differ in which of the two they keep; a verdict may not depend on it."""
    path = tmp_path / "run.jsonl"
    line = json.dumps(make_record()).replace(f'"{name}":', f'"{name}": 5, "{name}":')
    path.write_text(json.dumps(make_record()) + "\n" + line + end)
    with pytest.raises(RecordError, match=f"line 2: '{name}' is in one object twice"):
        read_frame([path])


@pytest.mark.parametrize(
    "time", ["", "soon", "2026-01-02", "2026-01-02T03:04:05", "2026-13-01T00:00:00Z"]
)
def test_a_time_that_says_not_when_is_an_error(
    make_record: MakeRecord, write: Write, time: str
) -> None:
    """Records are put in order by it, so that the last one counts."""
    with pytest.raises(RecordError, match="`started_at` should be a time in ISO 8601"):
        read_frame([write([make_record(started_at=time)])])


@pytest.mark.parametrize("versions", [{"torch": 2}, {"x": {"y": 1}}, {"x": None}, []])
def test_versions_are_text(
    make_record: MakeRecord, write: Write, versions: Any
) -> None:
    """Also of packages that have no column."""
    record = make_record(versions=versions)
    with pytest.raises(RecordError, match=r"line 1: `environment\.versions"):
        read_frame([write([record])])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda line: b"", "holds no record"),
        (lambda line: b" \n\n", "holds no record"),
        (lambda line: b"\xff\xfe" + line, "line 1: not JSON"),
        (lambda line: line.replace(b"Linux", b"Lin\xffux"), "line 1: not JSON"),
        (lambda line: line.decode().encode("utf-16"), "line 1: not JSON"),
        (lambda line: b"\x1f\x8b\x08\x00binary", "holds no record"),
        (lambda line: b"[" * 100_000 + b"\n", "line 1: not JSON"),
        (lambda line: b"9" * 10_000 + b"\n", "line 1: not JSON"),
        (lambda line: b'"text"\n', "line 1: expected a JSON object, got 'text'"),
        (lambda line: b"null\n" + line, "line 1: expected a JSON object, got None"),
        (
            lambda line: line.replace(b'"schema_version": 2', b'"schema_version": 1'),
            "line 1: schema version 1, expected 2; run its cells again with",
        ),
        (
            lambda line: line.replace(
                b'"schema_version": 2', b'"schema_version": true'
            ),
            "line 1: schema version True, expected 2",
        ),
    ],
)
def test_what_is_no_file_of_records_is_an_error(
    capsys: pytest.CaptureFixture[str],
    make_record: MakeRecord,
    write: Write,
    tmp_path: Path,
    content: Callable[[bytes], bytes],
    message: str,
) -> None:
    """In one line, with the code of a mistake, as a run and as a baseline."""
    good = write([make_record()])
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(content(good.read_bytes()))
    for run, baseline in ((bad, good), (good, bad)):
        code = main(["check", str(run), "--baseline", str(baseline), *LIMIT])
        output, errors = capsys.readouterr()
        assert (code, output) == (2, "")
        last = errors.splitlines()[-1]
        if baseline != bad or "holds no record" not in message:
            assert message in last
        assert last.startswith("meft-report check: ")


def test_a_folder_is_not_a_file_of_records(
    capsys: pytest.CaptureFixture[str],
    make_record: MakeRecord,
    write: Write,
    tmp_path: Path,
) -> None:
    """Neither as a run nor as a baseline."""
    good = write([make_record()])
    for run, baseline in ((tmp_path, good), (good, tmp_path)):
        assert main(["check", str(run), "--baseline", str(baseline), *LIMIT]) == 2
        output, errors = capsys.readouterr()
        assert output == ""
        assert f"cannot read {tmp_path}: Is a directory" in errors


def test_a_byte_order_mark_is_no_part_of_a_record(
    make_record: MakeRecord, write: Write
) -> None:
    """Editors put it there."""
    path = write([make_record()])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_records([path])[0]) == 1


def test_a_baseline_is_whole(make_record: MakeRecord, write: Write) -> None:
    """Half a line of it is a cell that nothing would be held to."""
    path = write([make_record(seed=1), make_record(seed=0)])
    assert [r["cell"]["seed"] for r in read_baseline(path)] == [0, 1]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecordError, match=r"line 2: the last line is not whole .*rest"):
        read_baseline(path)
    assert len(read_records([path])[0]) == 1


def test_a_baseline_holds_each_cell_once(make_record: MakeRecord, write: Write) -> None:
    """Both sides of a merge would leave it to chance which of them is held."""
    path = write([make_record(seed=1), make_record(seed=0), make_record(seed=1)])
    with pytest.raises(RecordError, match="line 3: the cell of line 1 again"):
        read_baseline(path)


def test_errors_and_notes_are_bounded(
    make_record: MakeRecord, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a field is called, and whatever it holds."""
    record = make_record()
    record["measurement"] |= {f"\x1b[31m{n}{'x' * 10_000}": 1 for n in range(50)}
    read_frame([write([record])])
    note = capsys.readouterr().err
    assert "fields this report does not know" in note
    assert "and 40 more" in note
    assert len(note) < 2000
    assert "\x1b" not in note
    for broken in ({"status": "\x1b" * 10**6}, {"sweep": ["\x1b" * 10**6]}):
        with pytest.raises(RecordError) as error:
            read_frame([write([make_record() | broken])])
        assert len(str(error.value)) < 1000
        assert "\x1b" not in str(error.value)
