"""`meft-bench` lists, runs and shows what a sweep declares."""

import dataclasses
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path
from types import ModuleType

import pytest

from marks import slow_but_for
from meft_bench.parent import (
    arguments,
    cli,
    doctor,
    harness,
    planning,
    runs,
    selection,
    sweep,
)
from meft_bench.parent.engines import environment
from meft_bench.shared import configs
from meft_bench.shared.cell import Cell
from meft_bench.shared.measurement import Measurement
from meft_bench.shared.record import Record, Status

pytestmark = pytest.mark.usefixtures("folder")


def run(*words: str, worker: str = "fake_ok") -> int:
    """`meft-bench run mine.toml` with a fake child."""
    return cli.main(
        ["run", "mine.toml", *words], worker_module=f"harness.workers.{worker}"
    )


def test_list_is_light(folder: Path) -> None:
    """Listing a sweep takes well under a second of processor time and imports nothing
    heavy."""
    program = (
        "import sys, time\n"
        "from meft_bench.parent.cli import main\n"
        "main(['list', 'quickstart', '--device', 'cpu'])\n"
        "heavy = {'torch', 'transformers', 'meft', 'peft', 'datasets', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print(time.process_time())\n"
    )
    times = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        *_, summary, heavy, seconds = done.stdout.splitlines()
        times.append(float(seconds))
    assert summary == "92 cells, 0 done in runs/quickstart.jsonl"
    assert heavy == "[]"
    assert min(times) < 0.8
    assert not (folder / "runs").exists()


def test_list_marks_done(capsys: pytest.CaptureFixture[str]) -> None:
    """`list` shows each cell by its id, and which are done."""
    run("--only", "head")
    capsys.readouterr()
    assert cli.main(["list", "mine.toml"]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert summary == "5 cells, 1 done in runs/mine.jsonl"
    assert [line for line in lines if line.startswith("done")] == [
        "done  head/minilm-l6/b16-s128-fp32/synthetic/seed0"
    ]


def test_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run ends with the counts, the records, and how to make the page."""
    assert run() == 0
    seen = capsys.readouterr()
    assert seen.out.splitlines() == [
        "ok 5",
        "records: runs/mine.jsonl",
        "page:    meft-report page runs/mine.jsonl -o runs/mine.html",
    ]
    records = runs.read(folder / "runs" / "mine.jsonl")
    assert [record.status for record in records] == [Status.OK] * 5
    assert {record.sweep for record in records} == {"mine"}
    printed = seen.err.splitlines()
    assert len(printed) == 5
    assert re.fullmatch(r"\[1/5\] ok \d+\.\d s full/minilm-l6/\S+", printed[0])


def test_failures(capsys: pytest.CaptureFixture[str]) -> None:
    """A failed cell is printed with its reason and its log; the exit code is 4."""
    assert run("--only", "head", worker="fake_mixed") == 4
    seen = capsys.readouterr()
    assert seen.out.startswith("oom 1\n")
    printed = re.search(r"\noom: head/\S+: too small \((.+\.log)\)\n", seen.err)
    assert printed is not None
    assert Path(printed[1]).is_file()


def test_a_remark_on_an_ok_cell_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """By `run` when the cell ends, by `show` later; the exit code stays 0."""
    said = "the loss was not finite from step 2 of 5 on"
    assert run("--only", "head", worker="fake_remarks") == 0
    assert re.search(rf"\nnote: head/\S+: {said}\n", capsys.readouterr().err)
    assert cli.main(["show", "head", "runs/mine.jsonl"]) == 0
    assert re.search(rf"(?m)^status +ok {said}$", capsys.readouterr().out)


def test_nothing_ran(capsys: pytest.CaptureFixture[str]) -> None:
    """Where every cell was skipped the exit code says so, however often it is run."""
    for _ in range(2):
        assert run("--only", "lora", worker="fake_mixed") == 3
        assert capsys.readouterr().out.startswith("skipped 1\n")


def test_why_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every cell that does not run it is said why: a line for each reason, with how
    many there are and the first of them. Some are ok, so the code is 0, also when this
    very run only skipped."""
    axes = 'axes = { method = ["full", "lora"], seed = [0, 1, 2, 3] }\n'
    exclude = 'exclude = [{ method = "full", seed = [2, 3] }]\n'
    (folder / "mine.toml").write_text(
        f'question = "Why not?"\n[[matrix]]\nname = "one"\n{axes}{exclude}'
    )
    assert run("--only", "full", "--threads", "3") == 0
    assert run("--threads", "3", worker="fake_mixed") == 0
    said = capsys.readouterr().err.splitlines()
    ids = [f"{{}}/minilm-l6/b16-s128-fp32/synthetic/seed{seed}" for seed in range(4)]
    full, lora = ([name.format(method) for name in ids] for method in ("full", "lora"))
    assert said[:2] == [
        "excluded, 2: by the sweep's own rules",
        "not selected, 4 of 6: `--only full`",
    ]
    assert said[4:6] == [
        "excluded, 2: by the sweep's own rules",
        f"not run again, 2 of 6 ({full[0]}, {full[1]}): ok under the same code, "
        "machine and versions of packages; `--force` runs them, too",
    ]
    assert said[-1] == (
        f"skipped, 4 of 4 ({', '.join(lora[:3])} and 1 more): no such data"
    )
    assert len(said) == 6 + 4 + 1


def test_the_id_of_a_cell_selects_that_cell_alone() -> None:
    """Also where it begins the id of another cell; a part of ids selects both."""
    one, other = Cell(method="meft1"), Cell(method="meft1", lost_bits=8)
    assert other.id.startswith(one.id)
    chosen = sweep.Sweep(
        name="mine",
        question="Which?",
        cells=(one, other),
        num_excluded=0,
        memory_limit_bytes=None,
        timeout_seconds=1.0,
        num_threads=None,
    )
    assert selection.select(chosen, one.id) == (one,)
    assert selection.select(chosen, one.id[1:]) == (one, other)


def test_code_that_comes_back_runs_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a change and back again the last record is that of the code at hand, and
    `list` says of every code what `run` does."""
    for code, is_done in [("a", False), ("b", False), ("a", False), ("a", True)]:
        monkeypatch.setattr(environment, "digest", lambda _folders, code=code: code)
        assert cli.main(["list", "mine.toml", "--only", "full"]) == 0
        seen = capsys.readouterr().out
        assert ("1 cells, 1 done" in seen, seen.startswith("done")) == (is_done,) * 2
        assert run("--only", "full") == 0
        assert ("not run again" in capsys.readouterr().err) == is_done
        *_, last = runs.read(folder / "runs" / "mine.jsonl")
        assert last.environment.code_sha256 == code


def test_other_threads_and_slots_of_what_is_done_are_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Times do not compare with theirs; the fake child says that it had 3 threads."""
    assert run("--only", "full", "--slots", "2") == 0
    assert run("--only", "full", "--slots", "2", "--threads", "3") == 0
    assert "ran with" not in capsys.readouterr().err
    assert run("--only", "full", "--slots", "1", "--threads", "3") == 0
    assert (
        "packages; 1 of them ran with --threads 3 --slots 2; `--force` runs them, too"
    ) in capsys.readouterr().err


def test_force(folder: Path) -> None:
    """`--force` runs what is done, too; its old record remains."""
    for words, count in [((), 1), ((), 1), (("--force",), 2)]:
        assert run("--only", "head", *words) == 0
        assert len(runs.read(folder / "runs" / "mine.jsonl")) == count


def test_a_changed_config_file_runs_again(folder: Path) -> None:
    """The shape of a random backbone is part of what was measured."""
    config = folder / "config.json"
    config.write_text('{"model_type": "bert"}')
    backbone = f"random:{config}"
    records = [
        Record(
            sweep="mine",
            cell=Cell(method="full", backbone=backbone),
            status=Status.OK,
            message="",
            started_at="2026-01-01T00:00:00+00:00",
            wall_seconds=1.0,
            measurement=Measurement(),
            environment=dataclasses.replace(
                environment.collect(num_threads=1, num_slots=1, device="cpu"),
                weights_sha256=configs.digest(backbone),
            ),
        )
    ]
    cell = records[0].cell
    here = {"cpu": records[0].environment}
    assert [*runs.done(records, [cell], here)] == [cell]
    config.write_text('{"model_type": "bert", "hidden_size": 8}')
    assert [*runs.done(records, [cell], here)] == []


def test_a_device_that_the_sweep_overrides_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--device` is for cells whose matrix names none."""
    named = (
        (folder / "mine.toml")
        .read_text()
        .replace("axes = {", 'defaults = { device = "virtual-H100" }\naxes = {')
    )
    (folder / "named.toml").write_text(named)
    words = ["run", "named.toml", "--device", "cpu"]
    assert cli.main(words, worker_module="harness.workers.fake_ok") == 0
    assert "not on cpu: the sweep itself names virtual-H100" in capsys.readouterr().err


def test_only(capsys: pytest.CaptureFixture[str]) -> None:
    """`--only` takes a method by its whole name, and anything else as part of an id."""
    for only, methods in [
        ("meft1", ["meft1"]),
        ("meft1-", ["meft1-store"]),
        ("synthetic", ["full", "head", "lora", "meft1", "meft1-store"]),
        ("ft1", ["meft1", "meft1-store"]),
    ]:
        assert cli.main(["list", "mine.toml", "--only", only]) == 0
        *lines, _ = capsys.readouterr().out.splitlines()
        assert [line.split("/")[0].strip() for line in lines] == methods


def test_options_reach_the_child(folder: Path) -> None:
    """Data, downloads, threads and memory limit arrive at the child as set."""
    (folder / "data").mkdir()
    words = ["--data", "data", "--allow-download", "--threads", "3"]
    words += ["--memory-limit", "8GiB", "-o", "other.jsonl", "--only", "full"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meft_bench.parent.engines.isolate._MESSAGE_LENGTH", 10**6)
        run(*words, worker="fake_echo")
    (record,) = runs.read(folder / "other.jsonl")
    variables, options = json.loads(record.message)
    options = {n: v for n, v in options.items() if not n.startswith("checkpoint")}
    assert options == {
        "data_dir": str(folder / "data"),
        "allow_download": True,
        "num_threads": 3,
        "save_to": None,
        "memory_limit_bytes": 8 * 2**30,
    }
    assert variables["OMP_NUM_THREADS"] == "3"
    assert record.environment.num_threads == 3


def test_data_from_variable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `--data` the directory is `MEFT_DATA_DIR`."""
    (folder / "data").mkdir()
    monkeypatch.setenv("MEFT_DATA_DIR", str(folder / "data"))
    plan = selection.run_plan(arguments.parser().parse_args(["run", "mine.toml"]))
    assert plan.options.data_dir == str(folder / "data")


def test_timeout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--timeout` ends a child that hangs."""
    monkeypatch.setenv("FAKE_PIDS", str(folder / "pids"))
    assert run("--only", "head", "--timeout", "0.5", worker="fake_hangs") == 4
    (record,) = runs.read(folder / "runs" / "mine.jsonl")
    assert record.status == Status.TIMEOUT


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (harness, ["run", "mine.toml"]),  # before its first cell
        (runs, ["show", "full", "runs/mine.jsonl"]),
        (doctor, ["doctor"]),
        (planning, ["plan", "bert-tiny", "--gpu", "H100"]),
    ],
)
def test_interrupted(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: ModuleType,
    words: list[str],
) -> None:
    """Ctrl-C ends any command with the code of the docs, and leaves nothing behind."""
    name = {harness: "_engine", runs: "read", doctor: "examine"}
    (folder / "runs").mkdir()
    (folder / "runs" / "mine.jsonl").touch()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, name.get(place, "ask"), interrupt)
    assert cli.main(words) == 130
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("", "meft-bench: interrupted\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "no-such-sweep"], "no sweep or file 'no-such-sweep'"),
        (["run", "quickstat"], "did you mean 'quickstart'?"),
        (["run", "bad.toml"], "bad.toml: matrix 'one': axes: unknown method 'ful'"),
        (["run", "mine.toml", "--only", "mft1"], "did you mean 'meft1'?"),
        (["run", "mine.toml", "--device", "cuda"], "device cuda: no GPU here ("),
        (["run", "mine.toml", "--device", "gpu"], "unknown device 'gpu'"),
        (["run", "mine.toml", "--data", "nowhere"], "data directory 'nowhere'"),
        (["run", "mine.toml", "--slots", "0"], "'0' is not a whole number above 0"),
        (["run", "mine.toml", "--threads", "x"], "'x' is not a whole number"),
        (["run", "mine.toml", "--threads", "99999"], "'99999' is more than 4,096"),
        (["run", "mine.toml", "--slots", "99999"], "'99999' is more than 4,096"),
        (["run", "mine.toml", "--thread", "2"], "did you mean '--threads'?"),
        (["show", "--json", "x"], "--json: valid: --help, -h; see meft-bench show"),
        (["run", "mine.toml", "--timeout", "-1"], "'-1' is not a number above 0"),
        (["run", "mine.toml", "--memory-limit", "8GB"], "'8GB' is not a size"),
        (["run", "mine.toml", "--memory-limit", "99999999999GiB"], "too large a size"),
        (["run", "mine.toml", "-o", "mine.toml"], "should end in .jsonl"),
        (["run"], "required: sweep"),
        (["rnu"], "invalid choice: 'rnu'"),
        (["show", "full", "no.jsonl"], "records file 'no.jsonl' does not exist"),
        (["show", "full", "empty.jsonl"], "'empty.jsonl' holds no records"),
        (["show", "full", "."], "Is a directory"),
        (["show", "full", "mine.toml"], "mine.toml: line 2 is not a record"),
        (["list", "mine.toml", "-o", "."], "should end in .jsonl"),
    ],
)
def test_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    """Bad input is reported in one line, exits with 2, and leaves no file."""
    bad = (folder / "mine.toml").read_text().replace('"full"', '"ful"')
    (folder / "bad.toml").write_text(bad)
    (folder / "empty.jsonl").touch()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    try:
        code = cli.main(words, worker_module="harness.workers.fake_ok")
    except SystemExit as exit_:
        code = exit_.code  # type: ignore[assignment]
    seen = capsys.readouterr()
    assert code == 2
    assert said in seen.err
    assert seen.err.count("\n") == 1
    assert seen.out == ""
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    """`show` prints a cell's record with units; a part of its id is enough."""
    run()
    capsys.readouterr()
    assert cli.main(["show", "head", "runs/mine.jsonl"]) == 0
    printed = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert printed["cell"].startswith("head/")
    assert printed["saved_bytes"] == "1 MiB (1048576)"
    assert printed["device_name"] == "fake device"
    assert "score" not in printed
    assert cli.main(["show", "seed0", "runs/mine.jsonl"]) == 2
    assert "5 cells in runs/mine.jsonl named 'seed0'" in capsys.readouterr().err
    name = "full/minilm-16/b16-s128-fp32/synthetic/seed0"
    assert cli.main(["show", name, "runs/mine.jsonl"]) == 2
    assert f"{name!r}; did you mean 'full/minilm-l6/" in capsys.readouterr().err


@pytest.mark.parametrize("num_columns", slow_but_for([100, 0], 0))
def test_one_line_on_a_terminal(num_columns: int) -> None:
    """On a terminal progress is one line: counts, the time left, the current cell.

    A terminal may not know its width, and say 0, as some containers' do.
    """
    our_end, their_end = pty.openpty()
    termios.tcsetwinsize(their_end, (24, num_columns))
    command = [sys.executable, "-P", "-m", "harness.workers.parent", "fake_slow"]
    process = subprocess.Popen(
        [*command, "run", "mine.toml", "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=their_end,
    )
    os.close(their_end)
    text = _read_all(our_end).decode()
    assert process.wait() == 0
    assert text.count("\n") == 1
    assert text.endswith("\n")
    shown = [line.rstrip() for line in text.split("\r")]
    assert any(re.match(r"2/5 ok 2 \|.{10}\| 00:0\d left, meft1/", x) for x in shown)
    assert any(re.match(r"5/5 ok 5 \|█{10}\| 00:00 left, meft1-s", x) for x in shown)
    assert max(map(len, shown)) < (num_columns or 81)


def _read_all(terminal: int) -> bytes:
    text = b""
    try:
        while part := os.read(terminal, 4096):
            text += part
    except OSError:
        pass  # so Linux says that the other end is closed
    os.close(terminal)
    return text
