"""Two runs side by side, and one column over commits."""

import json
from pathlib import Path
from typing import Any

import pytest

from meft_reports.cli import main
from reporting.kinds import MakeRecord, Record


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command prints about some runs."""

    def tell(command: list[str], *runs: list[Record]) -> str:
        paths = []
        for number, records in enumerate(runs):
            path = tmp_path / f"{number}.jsonl"
            path.write_text("".join(json.dumps(r) + "\n" for r in records))
            paths.append(str(path))
        assert main([*command, *paths]) == 0
        return capsys.readouterr().out

    return tell


def test_what_differs_is_worst_first(told: Any, make_record: MakeRecord) -> None:
    sizes = [(100, 100), (100, 110), (100, 200), (100, 50)]
    before = [make_record(seed=i, saved_bytes=a) for i, (a, _) in enumerate(sizes)]
    after = [make_record(seed=i, saved_bytes=b) for i, (_, b) in enumerate(sizes)]
    before.append(make_record(seed=7))
    out = told(["compare"], before, after)
    assert "4 cells in both, 1 only in A, 0 only in B" in out
    assert "same environment in all of them" in out
    worse, _, better = out.partition("better (1 number of 1 cell)")
    assert worse.index("2.0000x") < worse.index("1.1000x")
    assert "0.5000x" in better
    assert "same (1) hidden; --all shows them" in better
    assert "geometric mean of ratios: saved 1.0241 (4 cells)" in better
    assert before[0]["cell_id"] in told(["compare", "--all"], before, after)


def test_one_cause_is_said_once(told: Any, make_record: MakeRecord) -> None:
    before = [make_record(seed=i, versions={"torch": "2.12"}) for i in range(50)]
    after = [make_record(seed=i, versions={"torch": "2.13"}) for i in range(50)]
    out = told(["compare"], before, after)
    assert out.count("2.12") == 1
    assert "differs: torch  2.12 → 2.13  (50 cells)" in out


@pytest.mark.parametrize(
    ("steps", "changes", "mark"),
    [
        ([0.5] * 12, {}, "~ p ="),
        ([0.5, 0.9], {}, "~ too few steps"),
        ([0.9 + i / 100 for i in range(12)], {"machine": "other"}, "~ another machine"),
        ([0.9 + i / 100 for i in range(12)], {}, ""),
    ],
)
def test_times_are_told_apart_or_not(
    told: Any,
    make_record: MakeRecord,
    steps: list[float],
    changes: dict[str, Any],
    mark: str,
) -> None:
    """On one machine, by a test over the steps after warm-up."""
    old = [0.5 + i / 1000 * (-1) ** i for i in range(12)]
    before = [make_record(step_seconds=0.5, all_step_seconds=old)]
    after = [make_record(step_seconds=0.6, all_step_seconds=steps, **changes)]
    out = told(["compare"], before, after)
    (line,) = [line for line in out.splitlines() if "step_seconds  0.5 s" in line]
    assert ("~" in line) == bool(mark)
    assert line.rstrip().endswith(mark) or mark in line


def test_a_higher_score_is_better_there_too(told: Any, make_record: MakeRecord) -> None:
    out = told(["compare"], [make_record(score=0.5)], [make_record(score=0.6)])
    assert "better (1 number" in out
    assert "worse (0 numbers" in out


def test_another_ending_is_said(told: Any, make_record: MakeRecord) -> None:
    out = told(["compare"], [make_record()], [make_record("oom")])
    assert "  ok → oom" in out


def test_a_history_has_a_line_for_each_step(told: Any, make_record: MakeRecord) -> None:
    """And none for the records in between, or for a cell that never changed."""
    records = [
        make_record(
            saved_bytes=size,
            started_at=f"2026-01-{day:02}T00:00:00Z",
            code_sha256=f"{day:064}",
            commit=f"{day:040}",
        )
        for day, size in enumerate([100, 100, 110, 110, 99], start=1)
    ]
    records.append(make_record(seed=3))
    out = told(["history", "saved"], records[::-1])
    lines = out.splitlines()
    assert lines[0].endswith("saved_bytes")
    assert [line.split()[0] for line in lines[1:4]] == [
        "2026-01-01",
        "2026-01-03",
        "2026-01-05",
    ]
    assert lines[2].endswith("+10 bytes (10 B), +10.00 %")
    assert lines[3].endswith("-11 bytes (11 B), -10.00 %")
    assert lines[-1] == "1 cell without a step"
    assert "+10 bytes" not in told(["history", "saved", "--only", "lora/*"], records)
