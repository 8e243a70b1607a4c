import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from marks import slow_but_for
from meft_reports.cli import main, parser
from meft_reports.frame_files import load_frame
from meft_reports.headline import METHODS as HEADLINE
from meft_reports.tables import TABLES
from reporting.kinds import Cli, MakeRecord, Record, Write

LIMITS = ("--fail-on", "saved:0", "--fail-on", "step_seconds:20%")


@pytest.fixture
def baseline(make_record: MakeRecord, write: Write) -> Path:
    """A baseline of two cells."""
    return write([make_record(seed=0), make_record(seed=1)], "baseline.jsonl")


def test_check_exits_0_when_nothing_got_worse(
    cli: Cli, make_record: MakeRecord, write: Write, baseline: Path
) -> None:
    """Also where something got better, which is said."""
    records = [make_record(seed=0), make_record(seed=1, saved_bytes=5)]
    done = cli("check", write(records), "--baseline", baseline, *LIMITS)
    assert (done.returncode, done.stderr) == (0, "")
    assert "improved" in done.stdout
    assert "consider updating the baseline" in done.stdout


def test_check_exits_1_on_a_regression(
    cli: Cli, make_record: MakeRecord, write: Write, baseline: Path
) -> None:
    """One byte over an exact limit is enough."""
    records = [make_record(seed=0), make_record(seed=1, saved_bytes=100 * 2**20 + 1)]
    done = cli("check", write(records), "--baseline", baseline, *LIMITS)
    assert done.returncode == 1
    assert "difference +1 bytes" in done.stdout


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("savd:0", "unknown column 'savd': did you mean 'saved'?"),
        ("saved:much", "'much' is not a threshold"),
        ("step_seconds:1GiB", "step_seconds is not in bytes"),
    ],
)
def test_check_exits_2_on_a_usage_error(
    cli: Cli,
    make_record: MakeRecord,
    write: Write,
    baseline: Path,
    limit: str,
    words: str,
) -> None:
    """In one line that says what to write instead."""
    run = write([make_record()])
    done = cli("check", run, "--baseline", baseline, "--fail-on", limit)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_check_exits_3_on_another_torch(
    cli: Cli, make_record: MakeRecord, write: Write, baseline: Path
) -> None:
    """Both versions are said."""
    versions = {"torch": "2.14.0"}
    run = write([make_record(seed=s, versions=versions) for s in (0, 1)])
    done = cli("check", run, "--baseline", baseline, *LIMITS)
    assert done.returncode == 3
    assert "torch_version 2.13.0" in done.stdout
    assert "torch_version 2.14.0" in done.stdout


def test_check_exits_4_when_a_cell_failed(
    cli: Cli, make_record: MakeRecord, write: Write, baseline: Path
) -> None:
    """Its status and message are said."""
    run = write([make_record(seed=0), make_record("oom", seed=1)])
    done = cli("check", run, "--baseline", baseline, *LIMITS)
    assert done.returncode == 4
    assert "got        oom: made-up oom" in done.stdout


def test_a_limit_given_twice_is_refused(
    capsys: pytest.CaptureFixture[str],
    make_record: MakeRecord,
    write: Write,
    baseline: Path,
) -> None:
    """Under either name: which of the two holds would be a guess."""
    run = str(write([make_record()]))
    limits = ["--fail-on", "saved:0", "--fail-on", "saved_bytes:5%"]
    assert main(["check", run, "--baseline", str(baseline), *limits]) == 2
    assert "given twice for saved_bytes" in capsys.readouterr().err


def test_baseline_keeps_ok_cells_in_order(
    capsys: pytest.CaptureFixture[str],
    make_record: MakeRecord,
    write: Write,
    tmp_path: Path,
) -> None:
    """The records whole, one a line, sorted by cell and their fields by name."""
    records = [make_record(seed=2), make_record("oom", seed=1), make_record(seed=0)]
    out = tmp_path / "new.jsonl"
    assert main(["baseline", str(write(records)), "-o", str(out)]) == 0
    lines = [json.dumps(records[place], sort_keys=True) for place in (2, 0)]
    assert out.read_text().splitlines() == lines
    assert "2 cells: 2 added, 0 removed" in capsys.readouterr().out


def test_baseline_shows_what_changes(
    capsys: pytest.CaptureFixture[str],
    make_record: MakeRecord,
    write: Write,
    baseline: Path,
) -> None:
    """Added, removed and why, changed from what to what, not kept and why."""
    run = write(
        [
            make_record(seed=0, saved_bytes=7, gradient_error=[0.1, None]),
            make_record("oom", seed=1),
            make_record(seed=2),
            make_record("killed", seed=3),
        ]
    )
    assert main(["baseline", str(run), "-o", str(baseline), "--remove"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [make_record(seed=seed)["cell_id"] for seed in range(4)]
    assert lines == [
        f"changed  {names[0]} saved_bytes: 104,857,600 bytes (100.0 MiB) → "
        "7 bytes (7 B)",
        f"changed  {names[0]} gradient_error: null → not finite",
        f"removed  {names[1]} (oom)",
        f"added    {names[2]}",
        f"not kept {names[3]} (killed)",
        "2 cells: 1 added, 1 removed, 1 with another record",
        f"wrote {baseline}",
    ]


@pytest.mark.parametrize("status", ["oom", "error", "timeout", "killed", "skipped", ""])
def test_a_baseline_loses_a_cell_on_request_only(
    capsys: pytest.CaptureFixture[str],
    make_record: MakeRecord,
    write: Write,
    baseline: Path,
    status: str,
) -> None:
    """Neither to a cell that failed nor to a run of fewer cells; the flag is named."""
    before = baseline.read_bytes()
    failed = [make_record(status, seed=1)] if status else []
    run = write([make_record(seed=0, saved_bytes=7), *failed])
    arguments = ["baseline", str(run), "-o", str(baseline)]
    assert main(arguments) == 2
    name = make_record(seed=1)["cell_id"]
    assert capsys.readouterr().err == (
        f"meft-report baseline: {baseline} would lose 1 of its cells: {name} "
        f"({status or 'not in the runs'}); run these cells until they end well, or "
        "pass --remove to drop them\n"
    )
    assert baseline.read_bytes() == before
    assert main([*arguments, "--remove"]) == 0
    assert len(baseline.read_text().splitlines()) == 1


def test_many_cells_that_would_be_lost_are_counted(
    capsys: pytest.CaptureFixture[str], make_record: MakeRecord, write: Write
) -> None:
    """Five are named, however many there are."""
    for count, more in ((7, ", 2 more; run"), (6, ", 1 more; run"), (5, "runs); run")):
        records = [make_record(seed=seed) for seed in range(count + 1)]
        out = write(records, "baseline.jsonl")
        assert main(["baseline", str(write(records[:1])), "-o", str(out)]) == 2
        errors = capsys.readouterr().err
        assert (
            f"would lose {count} of its cells: {records[1]['cell_id']} (not" in errors
        )
        assert f"(not in the runs), {records[2]['cell_id']} (not" in errors
        assert errors.count("(not in the runs)") == 5
        assert more in errors


def test_a_baseline_that_is_not_whole_is_not_overwritten(
    capsys: pytest.CaptureFixture[str],
    make_record: MakeRecord,
    write: Write,
    baseline: Path,
) -> None:
    """What it had held is not known; an empty file has held nothing."""
    torn = baseline.read_bytes()[:-9]
    baseline.write_bytes(torn)
    run = write([make_record(seed=0)])
    assert main(["baseline", str(run), "-o", str(baseline)]) == 2
    assert "line 2: the last line is not whole" in capsys.readouterr().err
    assert baseline.read_bytes() == torn
    for nothing in (b"", b"\n", b" \r\n\n"):
        baseline.write_bytes(nothing)
        assert main(["baseline", str(run), "-o", str(baseline)]) == 0


def test_a_run_is_not_its_own_baseline(
    capsys: pytest.CaptureFixture[str], baseline: Path
) -> None:
    """It would always pass; by whatever path the file is named."""
    again = baseline.parent / "sub" / ".." / baseline.name
    (baseline.parent / "sub").mkdir()
    assert main(["check", str(again), "--baseline", str(baseline), *LIMITS]) == 2
    assert "is both the run and the baseline" in capsys.readouterr().err
    twin = baseline.parent / "twin.jsonl"
    twin.hardlink_to(baseline)
    assert main(["check", str(twin), "--baseline", str(baseline), *LIMITS]) == 2
    assert "is both the run and the baseline" in capsys.readouterr().err


def test_a_baseline_passes_its_own_check(
    cli: Cli, matrix: list[Record], write: Write, tmp_path: Path
) -> None:
    """What was just written down is what is expected."""
    run, out = write(matrix), tmp_path / "new.jsonl"
    assert cli("baseline", run, "-o", out).returncode == 0
    done = cli("check", run, "--baseline", out, *LIMITS)
    assert done.returncode == 0
    assert "0 numbers" not in done.stdout


def test_a_run_without_an_ok_cell_makes_no_baseline(
    capsys: pytest.CaptureFixture[str],
    make_record: MakeRecord,
    write: Write,
    baseline: Path,
) -> None:
    """The old file stays as it was."""
    before = baseline.read_bytes()
    runs = [str(write([make_record("oom")], name)) for name in ("a.jsonl", "b.jsonl")]
    assert main(["baseline", *runs, "-o", str(baseline)]) == 2
    assert f"no ok cell in {', '.join(runs)}: nothing" in capsys.readouterr().err
    assert baseline.read_bytes() == before


@pytest.mark.parametrize("name", ["cells.parquet", "cells.csv"])
def test_frame_writes_a_row_per_cell(
    matrix: list[Record], write: Write, tmp_path: Path, name: str
) -> None:
    """With the requested ending."""
    assert main(["frame", str(write(matrix)), "-o", str(tmp_path / name)]) == 0
    assert len(load_frame(tmp_path / name)) == len(matrix)


@pytest.mark.parametrize(
    ("name", "head"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_plot_writes_what_the_ending_says(
    matrix: list[Record], write: Write, tmp_path: Path, name: str, head: bytes
) -> None:
    """PNG, SVG or PDF."""
    out = tmp_path / name
    assert main(["plot", "score_memory", str(write(matrix)), "-o", str(out)]) == 0
    assert out.read_bytes().startswith(head)


def test_page_is_written_whole(
    cli: Cli, matrix: list[Record], write: Write, tmp_path: Path
) -> None:
    """By a real process with warnings as errors; nothing else is left behind."""
    run, out = write(matrix[:2]), tmp_path / "report.html"  # with few figures
    done = cli("page", run, "-o", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert out.read_text().endswith("</html>\n")
    assert sorted(tmp_path.iterdir()) == [out, run]


@pytest.mark.slow
def test_every_process_makes_the_same_page(
    every_kind: list[Record], write: Write, tmp_path: Path
) -> None:
    """Nothing depends on the order of a set, which differs from process to process."""
    run, pages = write(every_kind), []
    for seed in "0123":
        out = tmp_path / f"{seed}.html"
        subprocess.run(
            [sys.executable, "-m", "meft_reports", "page", str(run), "-o", str(out)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
        )
        pages.append(out.read_bytes())
    assert pages == pages[:1] * 4


@pytest.mark.parametrize("name", slow_but_for(TABLES, "results", "exactness"))
def test_table_prints_markdown(
    capsys: pytest.CaptureFixture[str],
    every_kind: list[Record],
    write: Write,
    name: str,
) -> None:
    """Every kind of table, by its name."""
    assert main(["table", name, str(write(every_kind))]) == 0
    assert capsys.readouterr().out.startswith("### ")


def test_help_names_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    """`meft-report table --help` lists what can be named."""
    with pytest.raises(SystemExit):
        parser().parse_args(["table", "--help"])
    shown = capsys.readouterr().out
    assert [name for name in TABLES if name not in shown] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("headline", ", ".join(HEADLINE)),
        ("results", "a task other than synthetic and synthetic-lm"),
        ("savings", "meft1-exact and at least one of full, checkpointing, "),
        ("ratios", "a MEFT method and adapters-checkpointing"),
        ("traffic", "a method with rows of neurons"),
        ("predictions", "the device cuda"),
    ],
)
def test_no_table_says_what_one_needs(
    capsys: pytest.CaptureFixture[str],
    make_record: MakeRecord,
    write: Write,
    name: str,
    words: str,
) -> None:
    """Methods, task or device, as the error of a figure does."""
    path = write([make_record(task="synthetic")])
    assert main(["table", name, str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"No table: `{name}` needs ")
    assert words in out


def test_no_figure_of_the_headline_names_the_methods_it_needs(
    capsys: pytest.CaptureFixture[str],
    make_record: MakeRecord,
    write: Write,
    tmp_path: Path,
) -> None:
    figure = str(tmp_path / "a.svg")
    assert main(["plot", "headline", str(write([make_record()])), "-o", figure]) == 2
    assert ", ".join(HEADLINE) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["plot", "memory-depth", "RUN", "-o", "a.png"],
            "did you mean 'memory_depth'?",
        ),
        (["plot", "memory_depth", "RUN", "-o", "a.pgn"], "did you mean '.png'?"),
        (["plot", "memory_depth", "ONE", "-o", "a.png"], "no workload on random input"),
        (["frame", "RUN", "-o", "a.parket"], "did you mean '.parquet'?"),
        (["frame", "RUN", "-o", "no/folder/a.csv"], "cannot write no/folder/a.csv"),
        (["page", "absent.jsonl", "-o", "a.html"], "cannot read absent.jsonl"),
        (["page", "BAD", "-o", "a.html"], "bad.jsonl, line 1: not JSON"),
        (["table", "failure", "RUN"], "did you mean 'failures'?"),
        (["table", "memory", "RUN", "-o", "a.txt"], "did you mean '.tex'?"),
        (["table", "memory", "RUN", "-o", "RUN"], "run.jsonl is one of the files"),
        (["table", "memory", "RUN", "-o", "no/a.tex"], "cannot write no/a.tex"),
        (["pge", "RUN", "-o", "a.html"], "did you mean 'page'?"),
        (["page", "RUN"], "required: -o/--output"),
        (["page", "RUN", "-o", "RUN"], "run.jsonl is one of the files of records"),
        (["baseline", "ONE", "RUN", "-o", "./run.jsonl"], "write to another file"),
        (["plot", "memory_depth", "RUN", "LINK", "-o", "LINK"], "link.png is one of"),
        (["check", "RUN", "--base", "ONE"], "unrecognized arguments: --base one.jsonl"),
        (["check", "RUN", "--baseline", "ONE"], "--fail-on is missing: give it, or"),
        (["check", "RUN", "--fail-on", "saved:0"], "--baseline is missing: give it"),
        (["check", "RUN", "--failon", "saved:0"], "did you mean '--fail-on'?"),
        (["page", "RUN", "-o", "a.txt"], "did you mean '.htm'?"),
        (["compare", "RUN", "ONE", "-o", "a.htlm"], "did you mean '.htm'?"),
        (["compare", "RUN", "ONE", "-o", "RUN"], "run.jsonl is one of the files"),
        (["compare", "RUN", "ONE", "--all", "-o", "a.html"], "leave out --all or -o"),
        (["compare", "RUN", "ONE", "-o", "no/a.html"], "cannot write no/a.html"),
        (["baseline", "RUN", "-o", "no/../run.jsonl"], "one of the files of records"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make_record: MakeRecord,
    matrix: list[Record],
    write: Write,
    argv: list[str],
    words: str,
) -> None:
    """It names what was wrong and the nearest thing that is right; exit code 2."""
    write(matrix, "run.jsonl")
    write([make_record()], "one.jsonl")
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "link.png").symlink_to(tmp_path / "run.jsonl")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    files = {"RUN": "run.jsonl", "ONE": "one.jsonl", "BAD": "bad.jsonl"}
    files["LINK"] = "link.png"
    code: object
    try:
        code = main([files.get(word, word) for word in argv])
    except SystemExit as exit:
        code = exit.code
    errors = capsys.readouterr().err
    assert code == 2
    assert words in errors
    assert errors.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_help_imports_nothing_heavy(cli: Cli) -> None:
    """It answers at once, with examples, and torch is never needed."""
    code = (
        "import sys; from meft_reports.cli import parser; parser().format_help(); "
        "heavy = {'pandas', 'matplotlib', 'pyarrow', 'torch'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert "meft-report check runs/gate.jsonl" in cli("--help").stdout


def test_the_harness_and_torch_are_never_imported() -> None:
    """A file is the whole interface."""
    code = (
        "import sys, pkgutil, importlib, meft_reports; "
        "[importlib.import_module(m.name) for m in "
        "pkgutil.walk_packages(meft_reports.__path__, 'meft_reports.') "
        "if not m.name.endswith('__main__')]; "
        "found = {'torch', 'meft', 'meft_bench'} & set(sys.modules); "
        "sys.exit(str(found) if found else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_records_may_be_compressed_and_outputs_may_not(
    matrix: list[Record],
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same table; half a file says so, and no output is plain text in .gz."""
    plain = write(matrix)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert main(["table", "memory", str(plain)]) == 0
    expected = capsys.readouterr().out
    assert main(["table", "memory", str(packed)]) == 0
    assert capsys.readouterr().out == expected
    out = tmp_path / "baseline.jsonl.gz"
    assert main(["baseline", str(packed), "-o", str(out)]) == 2
    assert "outputs are not compressed" in capsys.readouterr().err
    assert not out.exists()
    packed.write_bytes(packed.read_bytes()[:-9])
    assert main(["table", "memory", str(packed)]) == 2
    assert "not a whole gzip file" in capsys.readouterr().err
