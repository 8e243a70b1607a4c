"""Rows of a user become tasks of every kind; a row that is wrong is named."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from harness.own_files import questions, reviews, write_csv, write_jsonl
from harness.tiny import cell
from meft_bench.child.tasks import row_files
from meft_bench.child.tasks.loading import load_task
from meft_bench.child.tasks.question import AnswerTask
from meft_bench.child.tasks.task import Row, Task
from meft_bench.parent.own import tasks
from meft_bench.shared.source import Source


def load(folder: Path, table: dict[str, Any], **changes: Any) -> Any:
    """The task of a table, as the parent passes it to the child."""
    found = tasks.in_full(table, folder)
    assert found.rows is not None
    rows = json.loads(json.dumps(found.rows))
    return load_task(cell(task=found.value, **changes), Source(rows=rows))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows in the format of a suffix, and return their place."""
    if path.suffix == ".csv":
        write_csv(path, rows)
    elif path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return f"{path.suffix[1:] or 'dataset'}:{path.name}"


LIKED = {"text": "review", "label": "liked"}


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet", "rows"])
def test_every_format_has_the_same_rows(tmp_path: Path, name: str) -> None:
    """With the same split, whatever the seed, and the labels in order."""
    task = load(tmp_path, {"train": write(tmp_path / name, reviews()), **LIKED})
    assert isinstance(task, Task)
    assert task.num_labels == 2
    by_text = {row["review"]: ["no", "yes"].index(row["liked"]) for row in reviews()}
    parts = (task.train, task.validation, task.evaluation)
    assert [len(part) for part in parts] == [29, 3, 8]
    for row in (row for part in parts for row in part):
        assert isinstance(row, Row)
        assert row.label == by_text[row.texts[0]]
    other = load(tmp_path, {"train": f"{name_of(name)}:{name}", **LIKED}, seed=1)
    assert other.evaluation == task.evaluation
    assert {*other.train, *other.validation} == {*task.train, *task.validation}
    assert other.train != task.train


def name_of(file: str) -> str:
    return Path(file).suffix[1:] or "dataset"


def test_splits_are_files(tmp_path: Path) -> None:
    """With a file of its own for validation, all training rows are trained with."""
    rows = reviews(60)
    table = {
        "train": write(tmp_path / "a.csv", rows[:40]),
        "validation": write(tmp_path / "b.jsonl", rows[40:50]),
        "evaluation": write(tmp_path / "c.parquet", rows[50:]),
        **LIKED,
    }
    task = load(tmp_path, table)
    assert [len(task.train), len(task.validation), len(task.evaluation)] == [40, 10, 10]
    assert [row.texts[0] for row in task.evaluation] == [r["review"] for r in rows[50:]]
    fewer = load(tmp_path, table, train_rows=20, eval_rows=3)
    assert [len(fewer.train), len(fewer.evaluation)] == [20, 3]
    assert "train 40 and selection 10 of 40 rows, score 10 of 10 rows" in task.origin
    assert str(tmp_path) not in task.origin


def test_text_of_csv_is_text(tmp_path: Path) -> None:
    """`None`, `NA` and `01` are words; so are numbers, and quotes can hold lines."""
    words = ["None", "NA", "nan", "01", "1.50", "a\nb", 'a "b"', "é, ü"]
    rows = [{"t": word, "l": f"0{n % 2}"} for n, word in enumerate(words)]
    write_csv(tmp_path / "rows.csv", rows)
    found = row_files.read(f"csv:{tmp_path / 'rows.csv'}")
    assert found.columns["t"] == words
    task = load(tmp_path, {"train": "csv:rows.csv", "text": "t", "label": "l"})
    assert {row.texts[0] for row in (*task.train, *task.evaluation)} == {*words}


def test_tabs_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes("\ufefftext\tlabel\na, b\tx\nc\ty\n".encode())
    task = load(tmp_path, {"train": "csv:rows.tsv", "evaluation": 0.5})
    assert {row.texts for row in (*task.train, *task.evaluation)} == {("a, b",), ("c",)}


def test_pairs_and_numbers(tmp_path: Path) -> None:
    """Regression has labels of any number, and one output."""
    place = write(tmp_path / "rows.csv", reviews())
    table = {"train": place, "text": "review", "text_pair": "liked", "label": "stars"}
    task = load(tmp_path, {**table, "kind": "regression"})
    assert task.num_labels == 1
    stars = {row["stars"] for row in reviews()}
    for row in task.train:
        assert len(row.texts) == 2
        assert row.label in stars


def test_classes_of_a_dataset_have_its_names(tmp_path: Path) -> None:
    """In the order of the dataset, which may have classes that no row has."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names="zyx")}
    )
    rows = [{"text": str(n), "label": n % 2} for n in range(10)]
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    task = load(tmp_path, {"train": "dataset:saved"})
    assert task.num_labels == 3
    assert {(row.texts[0], row.label) for row in task.train} <= {
        (str(n), n % 2) for n in range(10)
    }


def test_numbers_of_classes_are_in_their_order(tmp_path: Path) -> None:
    """10 comes after 9, as it does not in a dictionary."""
    rows = [{"text": f"t{n}", "label": [9, 10, -1][n % 3]} for n in range(30)]
    task = load(tmp_path, {"train": write(tmp_path / "rows.jsonl", rows)})
    labels = {row.texts[0]: row.label for row in (*task.train, *task.evaluation)}
    assert [labels.get(f"t{n}", n) for n in range(3)] == [1, 2, 0]


def test_options_are_a_list_or_columns(tmp_path: Path) -> None:
    """The answer is the text of one of them, or its number from 0."""
    listed = load(tmp_path, {"train": write(tmp_path / "a.jsonl", questions())})
    rows = [
        {"prompt": q["prompt"], "A": "red", "B": "blue", "right": n % 2}
        for n, q in enumerate(questions())
    ]
    columns = load(
        tmp_path,
        {
            "train": write(tmp_path / "b.csv", rows),
            "options": ["A", "B"],
            "answer": "right",
        },
    )
    for task in (listed, columns):
        assert isinstance(task, AnswerTask)
        assert task.max_new_tokens == 0
        assert task.metric == "options_per_character"
        for question in task.train:
            right = "blue" if "good" in question.prompt else "red"
            assert question.accepted == (right,)
            assert question.answer == f" {right}"
            assert question.options == ("red", "blue")
    assert listed.train == columns.train


def test_answers_may_be_several(tmp_path: Path) -> None:
    """The first is learned, all are accepted; the answer ends with the model's end."""
    rows = [{"prompt": f"q{n} ", "answer": ["a ", f"b{n}"]} for n in range(10)]
    place = write(tmp_path / "rows.jsonl", rows)
    task = load(tmp_path, {"train": place, "max_new_tokens": 5})
    assert task.max_new_tokens == 5
    assert task.metric == "squad"
    assert task.stop == ""
    question = task.train[0]
    assert question.prompt.endswith(question.accepted[1][1:])
    assert question.answer == " a"


def test_texts_have_no_labels(tmp_path: Path) -> None:
    task = load(
        tmp_path, {"train": write(tmp_path / "rows.csv", reviews()), "text": "review"}
    )
    assert task.num_labels is None
    assert task.metric == "log_likelihood_per_token"
    assert isinstance(task.train[0], Row)


BAD: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "no text": (
        [{"text": "a", "label": "x"}, {"text": " ", "label": "y"}],
        {},
        "row 2: no value in column 'text': fill it in, or remove the row",
    ),
    "null": (
        [{"text": "a", "label": 1}, {"text": "b", "label": None}],
        {},
        "row 2: no value in column 'label'",
    ),
    "text that is none": (
        [{"text": ["a"], "label": 1}, {"text": ["b"], "label": 2}],
        {},
        "row 1: ['a'] in column 'text' should be text",
    ),
    "one class": (
        [{"text": "a", "label": "x"}] * 4,
        {},
        "every row has the same value in column 'label'",
    ),
    "numbers as classes": (
        [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}],
        {},
        "row 1: 0.5 in column 'label' should be text or a whole number",
    ),
    "no number": (
        [{"text": "a", "label": "1.5"}, {"text": "b", "label": "many"}],
        {"kind": "regression"},
        "row 2: 'many' in column 'label' should be a finite number",
    ),
    "infinite": (
        [{"text": "a", "label": "inf"}, {"text": "b", "label": "1"}],
        {"kind": "regression"},
        "row 1: 'inf' in column 'label' should be a finite number",
    ),
    "too few rows": (
        [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
        {},
        "`evaluation` = 0.2 of 2 rows leaves 0 to score",
    ),
    "no option": (
        [{"prompt": "q", "options": ["a", "b"], "answer": "c"}] * 9,
        {},
        "row 1: 'c' in column 'answer' should be one of the options ['a', 'b']",
    ),
    "one option": (
        [{"prompt": "q", "options": ["a"], "answer": "a"}] * 9,
        {},
        "row 1: options ['a'] should be two or more",
    ),
    "options in a text": (
        [{"prompt": "q", "options": "a, b", "answer": "a"}] * 9,
        {},
        "should be a list of options; columns with one option each are named",
    ),
    "an empty answer": (
        [{"prompt": "q", "answer": ["a", ""]}] * 9,
        {},
        "row 1: an empty answer in column 'answer'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_row_is_named(tmp_path: Path, name: str) -> None:
    rows, fields, words = BAD[name]
    place = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"rows\.jsonl") as caught:
        load(tmp_path, {"train": place, **fields})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_label_that_is_not_learned_is_named(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(10)]
    train = write(tmp_path / "train.csv", rows)
    other = write(tmp_path / "other.csv", [{"text": "t", "label": "aa"}])
    with pytest.raises(ValueError, match=r"other.csv, row 1: no row of .*'aa'"):
        load(tmp_path, {"train": train, "evaluation": other})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,label\na,b\na,b,c\n", "cannot be read as csv"),
        ("a.csv", "text,label\na\nb,c\n", "row 1: no value in column 'label'"),
        ("a.csv", "text,label\n", "it has no rows"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": \n',
            "cannot be read as jsonl",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name) as caught:
        load(tmp_path, {"train": f"{name[2:]}:{name}"})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_left_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells that run at the same time do not meet there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("rows.csv", "rows.jsonl", "rows.parquet"):
        write(tmp_path / name, reviews())
        row_files.read(f"{name_of(name)}:{tmp_path / name}")
    assert not (tmp_path / "cache").exists()


def test_a_function_of_the_user_makes_a_task(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from meft_bench.child.tasks.task import Row, Task, draw\n"
        "def load(cell, source):\n"
        "    train, validation = draw([Row(('a',), 0), Row(('b',), 1)] * 9, cell)\n"
        "    return Task(name='mine', num_labels=2, train=train, metric='accuracy',\n"
        "                validation=validation, evaluation=train, origin='here')\n"
        "def wrong(cell, source):\n"
        "    return []\n"
    )
    task = load_task(cell(task=f"python:{path}:load"), Source())
    assert isinstance(task, Task)
    assert len(task.train) == 17
    with pytest.raises(ValueError, match="returned list, expected a `Task`"):
        load_task(cell(task=f"python:{path}:wrong"), Source())
    with pytest.raises(ValueError, match=r"has no 'lod'; did you mean 'load'\?"):
        load_task(cell(task=f"python:{path}:lod"), Source())
    path.write_text("import no_such_module\n")
    other = path.rename(tmp_path / "other.py")
    with pytest.raises(ValueError, match=r"cannot be imported: ModuleNotFoundError"):
        load_task(cell(task=f"python:{other}:load"), Source())


@pytest.mark.parametrize(
    ("answer", "right"), [(0, "2"), (2, "1"), ("1", None), ("0", None), ("b", None)]
)
def test_a_number_in_json_is_a_place_and_a_text_an_option(
    tmp_path: Path, answer: int | str, right: str | None
) -> None:
    """Where a text is both, of different options, it is refused."""
    row = {"prompt": "q", "options": ["2", "0", "1"], "answer": answer}
    its = {"train": write(tmp_path / "rows.jsonl", [row] * 20)}
    if right is None:
        with pytest.raises(ValueError, match=r"the number of another|should be one of"):
            load(tmp_path, its)
        return
    task = load(tmp_path, its)
    assert isinstance(task, AnswerTask)
    assert {question.accepted for question in task.train} == {(right,)}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "options": ["a", None, "b"], "answer": "a"},
        {"prompt": "q", "options": ["a", "b"], "answer": [None, "a"]},
        {"prompt": "q", "options": ["2020-01-01", "2021-01-01"], "answer": 0},
        {"prompt": "q", "options": [1, 2.5], "answer": 0},
    ],
)
def test_lists_hold_texts(tmp_path: Path, row: dict[str, Any]) -> None:
    """Nothing that is missing, and nothing that a reader has made of a text."""
    its = {"train": write(tmp_path / "rows.jsonl", [row] * 20)}
    with pytest.raises(ValueError, match=r"in a list of column '.*' should be text"):
        load(tmp_path, its)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "text,label\nyes, it is fine,good\n", "row 1 has 3 values"),
        ("a.csv", "text,text,label\na,b,c\n", "has two columns 'text'"),
        ("a.tsv", 'text\tlabel\n"so\ta\n"it"\tb\n', "a value of several lines"),
    ],
)
def test_rows_of_csv_have_the_values_of_the_header(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        load(tmp_path, {"train": f"csv:{name}", "text": "text", "label": "label"})


def test_a_hidden_label_is_no_class(tmp_path: Path) -> None:
    """`datasets` has -1 where labels are not public."""
    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": ["a", "b"] * 10, "label": [0, 1] * 9 + [0, -1]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="-1 in column 'label' is the number of no"):
        load(tmp_path, {"train": "dataset:rows", "text": "text", "label": "label"})
