"""The verdict in the formats that systems for CI read."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from meft_reports.check import CheckResult
from meft_reports.cli import main
from meft_reports.formats import FORMATS, github, markdown
from reporting.kinds import MakeRecord
from reporting.verdicts import verdict

HOSTILE = "a|b</td><script>alert(1)</script>`*_[x](y)$z$\x1b[31m %0A::error::\n"


@pytest.fixture
def result(make_record: MakeRecord) -> CheckResult:
    """One cell of each kind of finding, and one that is as it was."""
    before = [make_record(seed=seed, saved_bytes=1000) for seed in range(6)]
    after = [
        make_record(seed=0, saved_bytes=1000),
        make_record(seed=1, saved_bytes=1500),
        make_record("error", seed=2, message=HOSTILE),
        make_record(seed=3, saved_bytes=900),
        make_record(seed=4, versions={"torch": "1.0"}),
        make_record(seed=6),
    ]
    return verdict(before, after, "saved:0")


def test_json_has_all_of_it(result: CheckResult) -> None:
    value = json.loads(FORMATS["json"](result))
    assert value["schema"] == "meft-check/1"
    assert value["exit_code"] == result.exit_code == 4
    assert value["counts"] == {
        "failed": 1,
        "regression": 1,
        "missing": 1,
        "not comparable": 1,
        "improved": 1,
        "new": 1,
    }
    assert len(value["findings"]) == 6
    regression = value["findings"][1]
    assert (regression["expected_number"], regression["got_number"]) == (1000, 1500)
    assert regression["column"] == "saved_bytes"
    assert regression["unit"] == "bytes"
    assert regression["difference"].endswith("+50.00 %")


def test_junit_counts_every_number(result: CheckResult) -> None:
    root = ET.fromstring(FORMATS["junit"](result))
    (suite,) = root
    assert suite.tag == "testsuite"
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors")}
    assert counts == {"tests": "7", "failures": "2", "errors": "1"}
    assert suite.get("skipped") == "1"
    assert sum(len(case) for case in suite) == 4
    (failed,) = suite.iter("error")
    assert "<script>" in (failed.text or "")
    assert "\x1b" not in (failed.text or "")


def test_markdown_shows_names_as_they_are(result: CheckResult) -> None:
    text = FORMATS["markdown"](result)
    assert text.startswith("### Memory check: failed\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 6
    assert {row.count("|") for row in rows} == {7}
    assert "<script" not in text
    assert "`" not in text
    assert text.count("saved&#95;bytes") == 3


def test_a_summary_of_many_findings_ends_in_time(make_record: MakeRecord) -> None:
    """GitHub drops one of a mebibyte; annotations are few."""
    before = [make_record(seed=seed, saved_bytes=1) for seed in range(4000)]
    after = [make_record(seed=seed, saved_bytes=2) for seed in range(4000)]
    result = verdict(before, after, "saved:0")
    text = markdown.to_markdown(result)
    assert len(text.encode()) < markdown.MOST_BYTES + 100
    assert text.endswith("more findings.\n")
    lines = [*github.annotations(result)]
    assert len(lines) == github.MOST_SHOWN + 1
    assert lines[-1].endswith("::and 3,991 more findings, in the log")


def test_annotations_are_one_line_each(result: CheckResult) -> None:
    """Their own marks are escaped in what they show."""
    lines = [*github.annotations(result)]
    assert len(lines) == 4
    assert all("\n" not in line and "\r" not in line for line in lines)
    assert sum(line.startswith("::error title=") for line in lines) == 3
    assert sum(line.startswith("::warning title=") for line in lines) == 1
    assert "%250A" in next(line for line in lines if "failed" in line)


def test_numbers_are_drawn_over_commits(result: CheckResult) -> None:
    """Of all cells that could be compared."""
    entries = json.loads(FORMATS["gha-benchmark"](result))
    assert [entry["value"] for entry in entries] == [1000, 1500, 900]
    assert entries[0].keys() == {"name", "unit", "value"}
    assert entries[0]["name"].endswith(" saved")
    measures = json.loads(FORMATS["bmf"](result))
    assert [one["saved"]["value"] for one in measures.values()] == [1000, 1500, 900]


@pytest.mark.parametrize("is_left_out", [False, True])
def test_under_github_the_step_is_told(
    make_record: MakeRecord,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_left_out: bool,
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    paths = [tmp_path / "before.jsonl", tmp_path / "after.jsonl"]
    for path, size in zip(paths, (1, 2), strict=True):
        path.write_text(json.dumps(make_record(saved_bytes=size)) + "\n")
    words = ["check", str(paths[1]), "--baseline", str(paths[0])]
    words += ["--fail-on", "saved:0", "--write", f"junit:{tmp_path / 'out.xml'}"]
    assert main([*words, *["--no-github"] * is_left_out]) == 1
    out = capsys.readouterr().out
    assert ("::error title=regression%3A saved_bytes::" in out) != is_left_out
    assert ("### Memory check: failed" in summary.read_text()) != is_left_out
    assert summary.read_text().startswith("before\n")
    ET.parse(tmp_path / "out.xml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("junit", "'junit' should be FORMAT:FILE"),
        ("junit:", "'junit:' should be FORMAT:FILE"),
        ("junti:x", "did you mean 'junit'"),
    ],
)
def test_a_format_that_there_is_not(
    text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["check", "a", "--baseline", "b", "--fail-on", "saved:0", "--write", text])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_nothing_that_is_read_is_written_over(
    make_record: MakeRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, base = tmp_path / "run.jsonl", tmp_path / "base.jsonl"
    for one in (path, base):
        one.write_text(json.dumps(make_record()) + "\n")
    words = ["check", str(path), "--baseline", str(base), "--fail-on", "saved:0"]
    for written in (path, base):
        before = written.read_bytes()
        assert main([*words, "--write", f"json:{written}"]) == 2
        assert "is one of the files of records" in capsys.readouterr().err
        assert written.read_bytes() == before
    twice = ["--write", f"json:{tmp_path / 'o'}", "--write", f"junit:{tmp_path / 'o'}"]
    assert main([*words, *twice]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_a_pattern_that_matches_nothing_checks_nothing(
    make_record: MakeRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typo in it must not switch the gate off."""
    path, base = tmp_path / "run.jsonl", tmp_path / "base.jsonl"
    for one in (path, base):
        one.write_text(json.dumps(make_record()) + "\n")
    words = ["check", str(path), "--baseline", str(base), "--fail-on"]
    assert main([*words, "saved:0@lorra*"]) == 2
    assert "matches no cell" in capsys.readouterr().err
    words.append("saved:0@full/*")
    assert main(words) == 0
