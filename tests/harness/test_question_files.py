"""The files of tasks that a language model answers in words."""

import json
from pathlib import Path

import pytest

from harness.tiny import cell
from meft_bench.child.scoring import answers
from meft_bench.child.scoring.rules import METRICS, Choice
from meft_bench.shared.registry import TASKS, load
from meft_bench.shared.source import MissingError, Source

QUESTIONS = ("nq-open", "triviaqa", "squad", "gsm8k", "arc-easy", "arc-challenge")
every_task = pytest.mark.parametrize("name", QUESTIONS)


def write(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def write_nq_open(root: Path) -> None:
    write(root / "nq-open", "topics.nq.dev.txt", "who wrote it\t['Ann', 'Bo']\n" * 20)
    row = json.dumps({"question": "who sang it", "answer": ["C", "D"]})
    write(root / "nq-open", "NQ-open.dev.jsonl", f"{row}\n" * 3)


def write_triviaqa(root: Path) -> None:
    rows = "Who wrote it?\t\"['Ann', 'Bo']\"\r\n" * 20
    for name in ("topics.dpr.trivia.dev.txt", "topics.dpr.trivia.test.txt"):
        write(root / "triviaqa", name, rows)


def write_squad(root: Path) -> None:
    paragraph = {
        "context": "The sky is blue.",
        "qas": [{"question": "What colour is it?", "answers": [{"text": "blue"}]}] * 4,
    }
    data = {"data": [{"paragraphs": [paragraph]}] * 10}
    write(root / "squad-xquad-en", "xquad.en.json", json.dumps(data))


def write_gsm8k(root: Path) -> None:
    row = json.dumps({"question": "One and one?", "answer": "1+1=2\n#### 2"})
    for name in ("train.jsonl", "test.jsonl"):
        write(root / "gsm8k", name, f"{row}\n" * 20)


def write_arc(root: Path) -> None:
    text = (
        "Please choose the correct answer to the question: What is up?\n\nAnswer1: the"
        " sky Answer2: the sea Answer3: a cat\n\nAnswer format: answer1/answer2/answer3"
    )
    rows = json.dumps([{"instruction": text, "answer": "answer1"}] * 20)
    for name in ("arc-easy", "arc-challenge"):
        for file in ("train.json", "test.json"):
            write(root / name, file, rows)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A few rows of every task."""
    makers = (write_nq_open, write_triviaqa, write_squad, write_gsm8k, write_arc)
    for make in makers:
        make(tmp_path)
    return Source(data_dir=tmp_path)


@every_task
def test_a_task_says_where_its_rows_come_from(name: str, source: Source) -> None:
    """Splits do not overlap in number, and the prompt ends where the answer begins."""
    task = load(TASKS[name])(cell(task=name, eval_rows=3), source)
    assert task.metric in METRICS
    assert len(task.evaluation) == 3
    assert len(task.validation) == (len(task.train) + len(task.validation)) // 10
    for question in (*task.train, *task.evaluation):
        assert question.prompt.endswith("Answer:")
        assert question.answer.startswith(" ")
        assert question.accepted
        right, wrong = question.right_option if question.options else 0, 1
        wanted = Choice(right, right) if question.options else question.answer
        other = Choice(wrong, wrong) if question.options else "nothing of it"
        for rule in METRICS[task.metric].values.values():
            assert rule(wanted, question) == 1
            assert rule(other, question) == 0
    assert "sha256" in task.origin


@every_task
def test_a_task_without_its_files_says_where_to_put_them(name: str) -> None:
    with pytest.raises(MissingError, match=f"--data DIR` with {name[:3]}|squad"):
        load(TASKS[name])(cell(task=name), Source())


@every_task
def test_the_real_files_are_read(name: str, data_dir: Path) -> None:
    task = load(TASKS[name])(cell(task=name), Source(data_dir=data_dir))
    sizes = {
        "nq-open": (8757, 3610),
        "triviaqa": (8837, 11313),
        "gsm8k": (7473, 1319),
        "arc-easy": (2251, 2376),
        "arc-challenge": (1119, 1172),
    }
    found = len(task.train) + len(task.validation), len(task.evaluation)
    if name == "squad":
        assert sum(found) == 1190
    else:
        assert found == sizes[name]
    assert all(len(q.options) != 1 for q in task.evaluation)


def test_the_most_frequent_number_of_gsm8k_is_4(data_dir: Path) -> None:
    """Of 210 training rows, and right for 35 of the 1319 official test rows."""
    task = load(TASKS["gsm8k"])(cell(task="gsm8k"), Source(data_dir=data_dir))
    assert answers.majority(task) == {"final_number": 35 / 1319}
    assert round(35 / 1319, 4) == 0.0265
