"""Tokens on disk: the same examples as without, and never an error."""

import dataclasses
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from harness import options_model
from harness.tiny import cell, task_of
from meft_bench.child.scoring import answers, labels
from meft_bench.child.tasks import token_cache
from meft_bench.child.tasks.batches import Example
from meft_bench.child.tasks.question import Question
from meft_bench.child.tasks.task import Row, Task

ROWS = tuple(Row((f"row {n}", "x" * (n % 7)), n % 3) for n in range(300))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return options_model.tokenizer()


def task(rows: tuple[Row, ...] = ROWS) -> Task:
    return Task(
        name="made up",
        num_labels=3,
        train=rows,
        validation=(),
        evaluation=rows[:1],
        metric="accuracy",
        origin="made up",
    )


def questions() -> list[Question]:
    return [
        Question(
            prompt=f"Question: {n}?\nAnswer:",
            answer=f" {n * n}",
            accepted=(str(n * n),),
            options=(str(n * n), "0 or so"),
        )
        for n in range(1, 250)
    ]


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.mark.parametrize("kind", ["labels", "numbers", "answers", "options"])
def test_examples_from_disk_are_those_that_are_made(
    kind: str,
    tokenizer: PreTrainedTokenizerFast,
    tokens_of_a_test: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens, segments and labels, with their types; nothing is tokenised again."""
    numbers = tuple(dataclasses.replace(row, label=row.label / 2) for row in ROWS)

    def examples() -> list[Example]:
        if kind == "options":
            return answers._options(questions(), tokenizer, 32)
        if kind == "answers":
            asked = task_of("options", *questions())
            return list(answers.examples(asked, tokenizer, cell(seq_len=32)).train)  # type: ignore[arg-type]
        rows = numbers if kind == "numbers" else ROWS
        return list(labels.examples(task(rows), tokenizer, cell(seq_len=9)).train)  # type: ignore[arg-type]

    made = examples()
    before = files(tokens_of_a_test)
    assert before
    monkeypatch.setattr(token_cache, "_write", None)  # is not called
    assert examples() == made
    assert files(tokens_of_a_test) == before
    assert {type(e.label) for e in made} == {type(e.label) for e in examples()}


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_another_row_tokenizer_or_length_has_another_file(
    tokenizer: PreTrainedTokenizerFast, tokens_of_a_test: Path
) -> None:
    """And so have answers and options of the same texts, and other code."""
    texts = [(f"row {n}", n) for n in range(300)]
    make = [Example(token_ids=[1], segment_ids=[0], label=0)] * 300

    def store(**changes: object) -> str:
        """The name of the file that is new, if there is one."""
        before = names(tokens_of_a_test)
        given: dict[str, object] = {
            "kind": "labels",
            "texts": texts,
            "tokenizer": tokenizer,
            "seq_len": 8,
            "code": [__file__],
            "make": lambda: make,
        }
        token_cache.cached(**given | changes)  # type: ignore[arg-type]
        return "".join(names(tokens_of_a_test) - before)

    assert store()
    assert not store()
    tokenizer(["some text"], truncation=True, max_length=4)  # changes its state
    assert not store()
    other = options_model.tokenizer()
    other.add_tokens(["row"])
    for changes in (
        {"texts": [*texts[1:], ("row 0", 1)]},
        {"texts": texts[:-1], "make": lambda: make[:-1]},
        {"tokenizer": other},
        {"seq_len": 9},
        {"kind": "options"},
        {"code": [token_cache.__file__]},
    ):
        assert store(**changes), changes


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"\x00" * len(content),
        lambda content: content[:-4],
        lambda content: content[:-4] + bytes(4),
        lambda content: b"not a file of tokens",
    ],
)
def test_a_damaged_file_is_made_again(
    damage: Callable[[bytes], bytes],
    tokenizer: PreTrainedTokenizerFast,
    tokens_of_a_test: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a note in the log, and whole from then on."""
    made = labels.examples(task(), tokenizer, cell(seq_len=9)).train
    (file,) = files(tokens_of_a_test)
    whole = file.read_bytes()
    assert damage(whole) != whole
    file.write_bytes(damage(whole))
    assert labels.examples(task(), tokenizer, cell(seq_len=9)).train == made
    assert f"{file} is damaged and is made again" in capsys.readouterr().err
    assert file.read_bytes() == whole
    assert labels.examples(task(), tokenizer, cell(seq_len=9)).train == made
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_no_error(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows are tokenised then, every time."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEFT_TOKEN_CACHE", str(tmp_path / "file" / "folder"))
    found = labels.examples(task(), tokenizer, cell(seq_len=9)).train
    assert len(found) == 300
    assert "tokens are not stored" in capsys.readouterr().err


def test_the_files_used_least_recently_are_removed(
    tokenizer: PreTrainedTokenizerFast,
    tokens_of_a_test: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many as it takes, and never the newest; to read a file is to use it."""
    lengths = (9, 10, 11)
    for seq_len in lengths:
        labels.examples(task(), tokenizer, cell(seq_len=seq_len))
    by_age = sorted(files(tokens_of_a_test), key=lambda file: file.stat().st_mtime_ns)
    for age, file in enumerate(by_age):
        os.utime(file, (age, age))
    labels.examples(task(), tokenizer, cell(seq_len=lengths[0]))  # used now
    monkeypatch.setattr(
        token_cache, "MOST_BYTES", sum(file.stat().st_size for file in by_age)
    )
    labels.examples(task(), tokenizer, cell(seq_len=12))
    left = files(tokens_of_a_test)
    assert by_age[0] in left
    assert by_age[1] not in left
    monkeypatch.setattr(token_cache, "MOST_BYTES", 1)
    labels.examples(task(), tokenizer, cell(seq_len=13))
    assert len(files(tokens_of_a_test)) == 1


def test_what_a_killed_cell_has_left_is_removed(
    tokenizer: PreTrainedTokenizerFast, tokens_of_a_test: Path
) -> None:
    """After an hour, in which any other cell has written its file."""
    old, new = (tokens_of_a_test / f"part-{name}" for name in ("old", "new"))
    for place in (old, new):
        place.mkdir()
        (place / "some.safetensors").write_text("half")
    os.utime(old, (0, 0))
    labels.examples(task(), tokenizer, cell(seq_len=9))
    assert not old.exists()
    assert new.exists()


def _encode(barrier: object) -> int:
    barrier.wait()  # type: ignore[attr-defined]
    made = options_model.tokenizer()
    return len(labels.examples(task(), made, cell(seq_len=9)).train)


def test_cells_at_the_same_time_have_one_file(tokens_of_a_test: Path) -> None:
    """Every one of them reads or makes all rows; no part of a file is left."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [
        context.Process(target=_check, args=(barrier,), daemon=True) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    (file,) = files(tokens_of_a_test)
    assert file.suffix == ".safetensors"


def _check(barrier: object) -> None:
    assert _encode(barrier) == 300


def test_few_rows_are_not_stored(
    tokenizer: PreTrainedTokenizerFast, tokens_of_a_test: Path
) -> None:
    labels.examples(task(ROWS[:9]), tokenizer, cell(seq_len=9))
    assert files(tokens_of_a_test) == []
