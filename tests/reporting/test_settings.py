"""Defaults of the check in pyproject.toml, thresholds of some cells, reasons."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from meft_reports.cli import main
from meft_reports.formats import FORMATS, github
from reporting.kinds import MakeRecord, Record
from reporting.verdicts import verdict


def lines(path: Path, *records: Record) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def runs(
    make_record: MakeRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A baseline below a folder with settings, and a run of more bytes."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    lines(tmp_path / "kept" / "base.jsonl", make_record(saved_bytes=1000))
    monkeypatch.chdir(tmp_path / "deep" / "er")
    return lines(tmp_path / "run.jsonl", make_record(saved_bytes=1001))


@pytest.mark.parametrize(("limit", "code"), [("saved:0", 1), ("saved:1", 0)])
def test_the_nearest_file_above_has_the_defaults(
    runs: Path, tmp_path: Path, limit: str, code: int
) -> None:
    """Its paths are relative to its folder, and the command line goes first."""
    text = f'[tool.meft]\nbaseline = "kept/base.jsonl"\nfail_on = ["{limit}"]\n'
    (tmp_path / "pyproject.toml").write_text(text)
    assert main(["check", str(runs)]) == code
    assert main(["check", str(runs), "--fail-on", "saved:1"]) == 0
    base = tmp_path / "kept" / "base.jsonl"
    assert main(["check", str(base), "--baseline", str(runs)]) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "--baseline is missing: give it, or `baseline` in [tool.meft]"),
        (
            '[tool.meft]\nbaselin = "x"',
            "unknown key 'baselin': did you mean 'baseline'?",
        ),
        ("[tool.meft]\nbaseline = 3", "`baseline` should be a text"),
        ('[tool.meft]\nfail_on = "saved:0"', "`fail_on` should be a list of texts"),
        ("[tool.meft]\nfail_on = []", "`fail_on` should be a list of texts"),
        ("[tool.meft", "pyproject.toml: "),
        ("a = " + "[" * 100_000, "pyproject.toml: "),
        ('[tool.meft]\nbaseline = "a\\u0000b"', "`baseline` should be a text"),
        ("tool = 3", "[tool.meft] is no table"),
        ("[tool]\nmeft = 3", "[tool.meft] is no table"),
    ],
)
def test_what_is_wrong_there_is_one_line(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    words: str,
) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    assert main(["check", str(runs)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_some_cells_may_differ_more(make_record: MakeRecord) -> None:
    """The last threshold that matches a cell holds."""
    before = [make_record(method=name, saved_bytes=100) for name in ("full", "lora")]
    after = [make_record(method=name, saved_bytes=104) for name in ("full", "lora")]
    (finding,) = verdict(before, after, "saved:0", "saved:4@lora/*").findings
    assert finding.cell_id.startswith("full/")
    assert not verdict(before, after, "saved:0", "saved:5%@*").findings
    assert len(verdict(before, after, "saved:4@lora/*", "saved:0").findings) == 2


def test_a_cell_that_nothing_checks_is_named(make_record: MakeRecord) -> None:
    """In every format in which the verdict is read; it decides nothing."""
    before = [make_record(method=name, saved_bytes=1) for name in ("full", "lora")]
    after = [make_record(method=name, saved_bytes=9) for name in ("full", "lora")]
    after[1] = before[1]
    result = verdict(before, after, "saved:0@lora/*")
    full = before[0]["cell_id"]
    assert (result.exit_code, result.num_compared) == (0, 1)
    assert (
        f"note: 1 cell not checked, as no threshold of --fail-on applies: {full}"
        in (str(result))
    )
    assert "2 cells in the baseline, 1 not checked, 1 numbers compared" in str(result)
    assert json.loads(FORMATS["json"](result))["not_checked"] == [full]
    assert "1 not checked" in FORMATS["markdown"](result)
    (suite,) = ET.fromstring(FORMATS["junit"](result))
    assert (suite.get("tests"), suite.get("skipped")) == ("2", "1")
    assert [*github.annotations(result)] == [
        "::warning title=not checked::no threshold applies to 1 cell"
    ]


def test_a_check_of_no_number_does_not_pass(make_record: MakeRecord) -> None:
    """As where the pattern matches a new cell only."""
    before = [make_record(method="full")]
    after = [*before, make_record(method="lora")]
    result = verdict(before, after, "saved:0@lora/*")
    assert result.exit_code == 3
    assert "expected   a threshold that applies to an ok cell" in str(result)


def test_a_pattern_must_be_there(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", str(runs), "--baseline", str(runs), "--fail-on", "saved:0@"]
    assert main(words) == 2
    assert "no pattern of cells follows the @" in capsys.readouterr().err


def test_a_baseline_keeps_why_it_changed(
    make_record: MakeRecord, tmp_path: Path
) -> None:
    """In the cells that did, until they change again."""
    path = tmp_path / "base.jsonl"

    def reasons(sizes: tuple[int, int], *words: str) -> list[Any]:
        run = lines(
            tmp_path / "run.jsonl",
            *(make_record(seed=i, saved_bytes=size) for i, size in enumerate(sizes)),
        )
        assert main(["baseline", str(run), "-o", str(path), *words]) == 0
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return [record.get("baseline_reason") for record in records]

    assert reasons((1, 1)) == [None, None]
    assert reasons((1, 2), "--reason", "wider streams") == [None, "wider streams"]
    assert reasons((1, 2)) == [None, "wider streams"]
    assert reasons((3, 2), "--reason", "k = 8") == ["k = 8", "wider streams"]
    assert reasons((3, 4)) == ["k = 8", None]
    assert (
        main(
            [
                "check",
                str(path),
                "--baseline",
                str(tmp_path / "run.jsonl"),
                "--fail-on",
                "saved:0",
            ]
        )
        == 0
    )
