"""docs/bring-your-own.md: its example runs as it stands, and its tables are true."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.markdown import parse
from harness.own_files import model_in, reviews, write_csv
from meft_bench.parent import cli
from meft_bench.parent.own import peft_training
from meft_bench.parent.own.tasks import KEYS
from meft_bench.shared.row_kinds import KINDS
from meft_reports import cli as reports_cli
from meft_reports.frame import read_frame

PAGE = "docs/bring-your-own.md"
FILES = {"python": "bias_only.py", "json": "lora.json", "toml": "own.toml"}


def blocks() -> Iterator[tuple[str, str]]:
    for token in parse(PAGE):
        if token.type == "fence":
            yield token.info, token.content


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the example, in a folder of their own."""
    for language, content in blocks():
        path = tmp_path / FILES.get(language, "")
        if language in FILES and not path.exists():
            path.write_text(content)
    write_csv(tmp_path / "reviews.csv", reviews())
    model_in(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands() -> list[list[str]]:
    text = next(content for language, content in blocks() if language == "console")
    return [line.removeprefix("$ ").split() for line in text.splitlines()]


def test_the_example_runs_as_it_stands(
    example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells are listed, run and shown by the commands that the page has."""
    programs = {"meft-bench": cli.main, "meft-report": reports_cli.main}
    for program, *words in commands():
        device = ["--device", "cpu"] if program == "meft-bench" else []
        assert programs[program]([*words, *device]) == 0, capsys.readouterr().err
    lines = (example / "own.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["status"] for record in records] == ["ok"] * 4
    full, lora, biases, peft = (record["measurement"] for record in records)
    assert peft["loss_curve"] is not None
    assert biases["num_trainable_parameters"] < lora["num_trainable_parameters"]
    assert lora["num_trainable_parameters"] == peft["num_trainable_parameters"]
    assert full["num_eval_rows"] == 10
    assert str(example) not in "".join(record["cell_id"] for record in records)
    frame = read_frame(example / "own.jsonl")
    assert {*frame["method"]} == {"full", "lora", "biases", "peft:lora.json"}
    assert {*frame["backbone"]} == {"small"}
    assert {*frame["task"]} == {"reviews"}
    page = (example / "own.html").read_text()
    assert "biases" in page
    for name in ("results", "differences", "memory", "origins", "environment"):
        assert reports_cli.main(["table", name, "own.jsonl"]) == 0, name
    plot = ["plot", "score_memory", "own.jsonl", "-o", "score.svg"]
    assert reports_cli.main(plot) == 0
    capsys.readouterr()
    assert cli.main(["list", "own.toml", "-o", "own.jsonl", "--device", "cpu"]) == 0
    listed = capsys.readouterr().out
    assert "4 cells, 4 done" in listed
    assert re.search(r"(?m)^biases is python:bias_only-[0-9a-f]{12}$", listed)


def test_the_tables_are_those_of_the_code() -> None:
    """Every key of a task, every kind with its metrics, and every parameter of PEFT."""
    text = Path(__file__).parents[2].joinpath(PAGE).read_text()
    keys = {*re.findall(r"`(\w+)`", text)}
    assert {*KEYS} <= keys
    for name, kind in KINDS.items():
        (row,) = re.findall(rf"(?m)^\| `{name}` \|.*$", text)
        metrics = re.findall(r"`(\w+)`", row.split("|")[4])
        assert metrics[: len(kind.metrics)] == [*kind.metrics]
    for name in (*peft_training.FIELDS, *peft_training.TABLES, *peft_training.FIXED):
        assert f"`{name}`" in text, name
