"""The history of what tests took, from the lines of the plugin of pytest."""

import json
from pathlib import Path
from typing import Any

import pytest

from meft_reports.cli import main
from meft_reports.errors import RecordError
from meft_reports.plugin_lines import is_of_tests, read


def line(peak: int, day: int, commit: str, **changes: Any) -> str:
    part = {"saved_bytes": 8, "peak_allocated_bytes": peak, "memory_breakdown": None}
    fields = {
        "path": "tests/test_step.py",
        "name": "test_step",
        "key": "torch 2.13.0, cpu",
        "started_at": f"2026-11-{day:02}T10:11:12+00:00",
        "entry": [part],
        "is_checked": True,
        "environment": {"project_commit": commit, "project_dirty": False},
    }
    return json.dumps(fields | changes) + "\n"


def test_a_step_of_a_test_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over several files, in the order of time; commits are those of the project."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    two.write_text(line(1000, 1, "a" * 40) + line(1000, 2, "b" * 40))
    one.write_text(line(1500, 3, "c" * 40))
    assert main(["history", "peak_allocated", str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert "tests/test_step.py::test_step (torch 2.13.0, cpu)" in out
    assert "2026-11-01  aaaaaaaa" in out
    assert "bbbbbbbb" not in out
    assert "cccccccc" in out
    assert "+50.00 %" in out
    assert main(["history", "saved", str(one), str(two)]) == 0
    assert "1 cell without a step" in capsys.readouterr().out


def test_parts_of_a_test_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    parts = [{"saved_bytes": size, "peak_allocated_bytes": size} for size in (1, 2)]
    path.write_text(line(1, 1, "a", entry=parts))
    assert [record["cell_id"].rpartition(", ")[2] for record in read(path)] == [
        "part 1",
        "part 2",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "not JSON"),
        (line(1, 1, "a", environment={"project_commit": 3}), "`environment.project_c"),
        (line(1, 1, "a", started_at=None), "`started_at` of what a test took"),
        (line(1, 1, "a", started_at="now"), "`started_at` should be a time"),
        (line(1, 1, "a", entry=[3]), "no JSON object"),
        (line(-1, 1, "a"), "`peak_allocated_bytes` should be a number of bytes"),
    ],
)
def test_what_is_no_line_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line(1, 1, "a") + text)
    assert is_of_tests(path)
    with pytest.raises(RecordError, match=f"a.jsonl:2: .*{words}"):
        read(path)


def test_records_are_of_no_test(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"schema_version": 2}\n')
    assert not is_of_tests(path)
    for text in ("no JSON\n", "[" * 100_000):
        path.write_text(text)
        assert not is_of_tests(path)
