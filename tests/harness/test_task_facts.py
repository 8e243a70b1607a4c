"""The facts of tasks, and every way that they name to take rows from."""

import dataclasses
import gzip
import json
import string
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from PIL import Image as Pillow

from harness.tiny import cell
from meft_bench.child.scoring.rules import METRICS as ANSWER_METRICS
from meft_bench.child.tasks.batches import Image, PixelForm, collate
from meft_bench.child.tasks.find import FORMATS
from meft_bench.child.tasks.metrics import METRICS
from meft_bench.child.tasks.task import Picture
from meft_bench.parent import fields
from meft_bench.shared import cell_document, tasks
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import TASKS, load
from meft_bench.shared.source import MissingError, Source
from meft_bench.shared.tasks import document
from meft_bench.shared.tasks.facts import (
    IMAGES,
    LABELS,
    NUMBER,
    OPTIONS,
    RECALL,
    WORDS,
    DataFiles,
    Facts,
    Hub,
)

every_task = pytest.mark.parametrize("facts", tasks.TABLE.values(), ids=tasks.TABLE)


def load_task(name: str, source: Source, **changes: object) -> Any:
    return load(TASKS[name])(cell(task=name, **changes), source)


def sizes(task: Any) -> tuple[int, int]:
    return len(task.train) + len(task.validation), len(task.evaluation)


# What is said of a task


def test_every_file_of_facts_is_in_the_table() -> None:
    names = {path.stem for path in Path(tasks.__file__).parent.glob("*.py")}
    known = {name.replace("-", "_") for name in tasks.TABLE}
    assert names - {"__init__", "facts", "document"} == known


def test_the_page_of_tasks_is_up_to_date() -> None:
    """`python -m meft_bench.shared.tasks.document docs/tasks.md` changes nothing."""
    page = Path(__file__).parents[2] / "docs" / "tasks.md"
    assert page.read_text() == document.page()
    listed = (page.parents[1] / "benchmarks" / "README.md").read_text()
    assert [name for name in tasks.TABLE if f"`{name}`" not in listed] == []


def test_the_page_of_fields_is_up_to_date() -> None:
    """`python -m meft_bench.shared.cell_document docs/fields.md` changes nothing."""
    page = Path(__file__).parents[2] / "docs" / "fields.md"
    assert page.read_text() == cell_document.text()
    for field in dataclasses.fields(Cell):
        assert f"| `{field.name}` |" in page.read_text()


@every_task
def test_facts_name_what_there_is(facts: Facts) -> None:
    """Functions, a metric of the kind, columns of the prompt, a licence."""
    for way in facts.ways:
        assert callable(load(f"{FORMATS}.{way.read}"))
    metrics = ANSWER_METRICS if facts.kind in (OPTIONS, WORDS) else METRICS
    assert facts.metric in (["recall"] if facts.kind == RECALL else metrics)
    prompted = [
        name for _, name, _, _ in string.Formatter().parse(facts.prompt) if name
    ]
    if facts.kind in (OPTIONS, WORDS, RECALL):
        assert tuple(prompted) == facts.fields
    else:
        assert facts.prompt == ""
    assert bool(facts.labels) == (facts.kind in (LABELS, IMAGES))
    assert bool(facts.max_new_tokens) == (facts.kind == WORDS)
    assert facts.licence
    assert facts.protocol
    assert (facts.metric == "pearson_and_spearman") == (facts.kind == NUMBER)


@every_task
def test_missing_rows_name_every_way(facts: Facts) -> None:
    """The files, the repository, the package; and a task that has its own rows."""
    if facts.name in ("bbc-news", "digits") or facts.is_made:
        pytest.skip("its rows are in a package, or made")
    with pytest.raises(MissingError) as caught:
        load_task(facts.name, Source())
    message = str(caught.value)
    for way in facts.ways:
        if isinstance(way, DataFiles):
            assert all(name in message for name in (way.folder, *way.names))
        else:
            assert isinstance(way, Hub)
            assert way.name in message
    assert ("digits" if facts.kind == IMAGES else "bbc-news") in message


# Rows of the directory of data


@pytest.mark.parametrize(
    ("name", "num_train", "num_evaluation", "is_part"),
    [
        ("cola", 8_551, 1_043, False),
        ("sst2", 67_349, 872, False),
        ("mrpc", 3_668, 408, False),
        ("stsb", 5_749, 1_500, False),
        ("qqp", 8_999, 1_000, True),
        ("mnli", 8_999, 1_000, True),
        ("qnli", 9_999, 5_463, True),
        ("rte", 2_490, 277, False),
        ("wnli", 635, 71, False),
        ("nq-open", 8_757, 3_610, True),
        ("triviaqa", 8_837, 11_313, True),
        ("squad", 899, 291, True),
        ("gsm8k", 7_473, 1_319, False),
        ("arc-easy", 2_251, 2_376, False),
        ("arc-challenge", 1_119, 1_172, False),
        ("openbookqa", 4_957, 500, False),
        ("piqa", 1_438, 400, True),
        ("boolq", 2_600, 670, True),
        ("fashion-mnist", 8_000, 2_000, True),
        ("mnist", 8_000, 2_000, True),
    ],
)
def test_the_real_files_have_the_rows_that_are_published(
    data_dir: Path, name: str, num_train: int, num_evaluation: int, is_part: bool
) -> None:
    """Where they are a part of the official rows, the record says so."""
    task = load_task(name, Source(data_dir=data_dir))
    assert sizes(task) == (num_train, num_evaluation)
    said = task.origin
    assert tasks.TABLE[name].licence in said
    assert "(sha256 " in said
    words = ("part of", "not train rows", "not the official")
    assert any(word in said for word in words) == is_part


def test_real_numbers_have_the_range_of_the_task(data_dir: Path) -> None:
    """STS-B's are from 0 to 5, with fractions."""
    task = load_task("stsb", Source(data_dir=data_dir))
    labels = {row.label for row in task.train}
    assert all(isinstance(label, float) for label in labels)
    assert (min(labels), max(labels)) == (0.0, 5.0)
    assert 3.8 in labels


def test_no_passage_of_boolq_trains_and_is_scored(data_dir: Path) -> None:
    """Several questions share a passage."""
    task = load_task("boolq", Source(data_dir=data_dir))
    learned, scored = (
        {q.prompt.rpartition("\nQuestion: ")[0] for q in rows}
        for rows in ((*task.train, *task.validation), task.evaluation)
    )
    assert not learned & scored
    assert len(learned | scored) < 3_270


def test_real_images_are_of_ten_classes(data_dir: Path) -> None:
    for name in ("fashion-mnist", "mnist", "digits"):
        task = load_task(name, Source(data_dir=data_dir))
        side = 8 if name == "digits" else 28
        assert all(p.pixels.shape == (side, side) for p in task.evaluation)
        assert {p.pixels.dtype for p in task.train} == {torch.uint8}
        assert len(Counter(p.label for p in task.train)) == 10
        assert max(int(p.pixels.max()) for p in task.train[:9]) == 255


# DataFiles as their authors have published them


def write(root: Path, folder: str, name: str, content: str | bytes) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    (root / folder / f"{name}.gz").write_bytes(gzip.compress(data))


def test_official_files_come_before_parts_of_them(tmp_path: Path) -> None:
    """Whichever order the directory lists them in."""
    lines = "index\tquestion\tsentence\tlabel\n0\tA?\tB.\tentailment\n"
    part = {"0": {"text_a": "C?", "text_b": "D.", "label": "not_entailment"}}
    for name in ("train_subset_9k.json", "train_subset_1k_heldout.json"):
        write(tmp_path, "glue/QNLI", name, json.dumps(part))
    write(tmp_path, "glue/QNLI", "dev.tsv", lines)
    task = load_task("qnli", Source(data_dir=tmp_path))
    assert [row.label for row in task.train] == [1, 1]
    assert "a random part of all" in task.origin
    write(tmp_path, "glue/QNLI", "train.tsv", lines)
    task = load_task("qnli", Source(data_dir=tmp_path))
    assert [row.label for row in task.train] == [0]
    assert "part" not in task.origin


def test_broken_lines_of_qqp_are_left_out(tmp_path: Path) -> None:
    """As by the loader of the hub, whose rows these are."""
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    lines = f"{header}0\t1\t2\tA?\tB?\t1\n1\t3\t4\tC?\n2\t5\t6\tE?\tF?\t0\n"
    for name in ("train.tsv", "dev.tsv"):
        write(tmp_path, "glue/QQP", name, lines)
    task = load_task("qqp", Source(data_dir=tmp_path))
    assert [(r.texts, r.label) for r in task.evaluation] == [
        (("A?", "B?"), 1),
        (("E?", "F?"), 0),
    ]


def test_mnli_has_matched_and_mismatched_rows(tmp_path: Path) -> None:
    """As many of each as there are, or as the cell says; the record counts both."""
    header = "index\tsentence1\tsentence2\tgold_label\n"
    row = "0\tA.\tB.\tneutral\n"
    for name, count in (("train", 1), ("dev_matched", 2), ("dev_mismatched", 3)):
        write(tmp_path, "glue/MNLI", f"{name}.tsv", header + row * count)
    source = Source(data_dir=tmp_path)
    for eval_rows, counts in ((0, (2, 3)), (1, (1, 1))):
        task = load_task("mnli", source, eval_rows=eval_rows)
        assert (len(task.evaluation), len(task.mismatched)) == counts
        assert f"score {counts[0]} of 2 official matched dev rows" in task.origin
        assert f" and {counts[1]} of 3 mismatched ones" in task.origin
        assert {row.label for row in task.mismatched} == {1}


def test_squad_has_its_official_files(tmp_path: Path) -> None:
    paragraph = {
        "context": "The sky is blue.",
        "qas": [{"question": "What is blue?", "answers": [{"text": "The sky"}] * 3}],
    }
    data = json.dumps({"data": [{"paragraphs": [paragraph] * 2}]})
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        write(tmp_path, "squad", name, data)
    task = load_task("squad", Source(data_dir=tmp_path))
    assert sizes(task) == (2, 2)
    assert task.evaluation[0].prompt == (
        "The sky is blue.\nQuestion: What is blue?\nAnswer:"
    )
    assert "official dev rows" in task.origin


def test_a_label_for_each_row_of_piqa(tmp_path: Path) -> None:
    row = json.dumps({"goal": "Do it", "sol1": "so", "sol2": "not so"})
    write(tmp_path, "piqa", "valid.jsonl", f"{row}\n{row}\n")
    write(tmp_path, "piqa", "valid-labels.lst", "0\n")
    with pytest.raises(ValueError, match=r"valid-labels.*: 1 labels, expected 2"):
        load_task("piqa", Source(data_dir=tmp_path))


def idx(array: Any) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    lengths = b"".join(length.to_bytes(4) for length in array.shape)
    values: bytes = array.astype("uint8").tobytes()
    return header + lengths + values


def write_idx(root: Path, folder: str, part: str, images: Any, labels: Any) -> None:
    write(root, folder, f"{part}-images-idx3-ubyte", idx(images))
    write(root, folder, f"{part}-labels-idx1-ubyte", idx(labels))


def test_images_have_their_official_files(tmp_path: Path) -> None:
    """Row by row, and each with its own label."""
    images = numpy.arange(4 * 6).reshape(4, 2, 3)
    write_idx(tmp_path, "mnist", "train", images, numpy.array([3, 1, 4, 1]))
    write_idx(tmp_path, "mnist", "t10k", images[:1], numpy.array([9]))
    task = load_task("mnist", Source(data_dir=tmp_path))
    found = sorted((int(p.pixels[0, 0]), p.label) for p in task.train)
    assert found == [(0, 3), (6, 1), (12, 4), (18, 1)]
    (scored,) = task.evaluation
    assert scored.pixels.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert scored.label == 9


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (b"", idx(numpy.zeros(1)), "images-idx3-ubyte.gz: not a whole IDX file"),
        (idx(numpy.zeros((1, 2, 2)))[:-1], idx(numpy.zeros(1)), "not a whole IDX file"),
        (idx(numpy.zeros((2, 2))), idx(numpy.zeros(1)), "not a whole IDX file"),
        (idx(numpy.zeros((2, 2, 2))), idx(numpy.zeros(1)), "1 labels, expected 2"),
        (idx(numpy.zeros((1, 2, 2))), idx(numpy.array([10])), "label 10, expected one"),
    ],
)
def test_damaged_images_are_refused(
    images: bytes, labels: bytes, words: str, tmp_path: Path
) -> None:
    write(tmp_path, "mnist-10k", "t10k-images-idx3-ubyte", images)
    write(tmp_path, "mnist-10k", "t10k-labels-idx1-ubyte", labels)
    with pytest.raises(ValueError, match=words):
        load_task("mnist", Source(data_dir=tmp_path))


# Rows of the hub

LETTERS = {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}
HUB_ROWS: dict[str, dict[str, Any]] = {
    "cola": {"sentence": "So.", "label": 1},
    "sst2": {"sentence": "So.", "label": 1},
    "mrpc": {"sentence1": "So.", "sentence2": "Yes.", "label": 1},
    "stsb": {"sentence1": "So.", "sentence2": "Yes.", "label": 3.25},
    "qqp": {"question1": "So?", "question2": "Yes?", "label": 1},
    "mnli": {"premise": "So.", "hypothesis": "Yes.", "label": 2},
    "qnli": {"question": "So?", "sentence": "Yes.", "label": 1},
    "rte": {"sentence1": "So.", "sentence2": "Yes.", "label": 1},
    "wnli": {"sentence1": "So.", "sentence2": "Yes.", "label": 1},
    "nq-open": {"question": "who", "answer": ["a", "b"]},
    "triviaqa": {
        "question": "Who?",
        "answer": {
            "value": "A",
            "aliases": ["A", "The A"],
            "normalized_aliases": ["a"],
        },
    },
    "squad": {
        "context": "So a.",
        "question": "Who?",
        "answers": {"text": ["a", "So a"], "answer_start": [3, 0]},
    },
    "gsm8k": {"question": "1+1?", "answer": "1+1=2\n#### 2"},
    "arc-easy": {"question": "Who?", "choices": LETTERS, "answerKey": "B"},
    "arc-challenge": {"question": "Who?", "choices": LETTERS, "answerKey": "B"},
    "openbookqa": {"question_stem": "It is", "choices": LETTERS, "answerKey": "B"},
    "piqa": {"goal": "Do it", "sol1": "so", "sol2": "not", "label": 1},
    "boolq": {"passage": "So.", "question": "is it", "answer": True},
    "sciq": {
        "support": "So.",
        "question": "Who?",
        "distractor1": "a",
        "distractor2": "b",
        "distractor3": "c",
        "correct_answer": "d",
    },
    "fashion-mnist": {"image": Pillow.new("L", (3, 2), 7), "label": 9},
    "mnist": {"image": Pillow.new("L", (3, 2), 7), "label": 9},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub that is not there: it gives one row for each split, and keeps requests."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, revision: str) -> Any:
        asked.append((name, config, revision))
        (facts,) = [
            facts
            for facts in tasks.TABLE.values()
            for way in facts.ways
            if isinstance(way, Hub) and (way.name, way.config or None) == (name, config)
        ]
        (way,) = [way for way in facts.ways if isinstance(way, Hub)]
        splits = filter(None, (way.train, way.evaluation, way.mismatched))
        return {split: [HUB_ROWS[facts.name]] for split in splits}

    class HubApi:
        def dataset_info(self, name: str) -> Any:
            return SimpleNamespace(sha=f"revision-of-{name}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", HubApi)
    return asked


@pytest.mark.parametrize("name", HUB_ROWS)
def test_rows_of_the_hub_are_read_at_a_revision(
    name: str, hub: list[tuple[Any, ...]]
) -> None:
    """That of the newest ones, which the record names; only if it is allowed."""
    with pytest.raises(MissingError):
        load_task(name, Source())
    assert hub == []
    task = load_task(name, Source(allow_download=True))
    ((repository, config, revision),) = hub
    assert revision == f"revision-of-{repository}"
    assert f"hub {repository}" in task.origin
    assert f"at revision {revision}" in task.origin
    assert (config is None) or config in task.origin
    (row,) = task.evaluation
    given = HUB_ROWS[name]
    if isinstance(row, Picture):
        assert row.pixels.tolist() == [[7] * 3] * 2
        assert row.label == 9
    elif hasattr(row, "texts"):
        assert (row.texts, row.label) == (tuple(given.values())[:-1], given["label"])
    elif row.options:
        wanted = {"piqa": "not", "boolq": "yes", "sciq": "d"}
        assert row.accepted == (wanted.get(name, "b"),)
        assert row.options[row.right_option] == row.accepted[0]
    else:
        wanted_first = {"nq-open": "a", "triviaqa": "A", "squad": "a"}
        assert row.accepted[0] == wanted_first.get(name) or given["answer"]
        assert len(row.accepted) == {"triviaqa": 3, "gsm8k": 1}.get(name, 2)
    if name == "mnli":
        assert len(task.mismatched) == 1


def test_every_repository_has_a_row_here() -> None:
    named = {
        name
        for name, facts in tasks.TABLE.items()
        if any(isinstance(way, Hub) for way in facts.ways)
    }
    assert named == set(HUB_ROWS)


def test_files_come_before_the_hub(tmp_path: Path, hub: list[tuple[Any, ...]]) -> None:
    """Who gives a directory wants its rows."""
    for name in ("train.tsv", "dev.tsv"):
        write(tmp_path, "glue/RTE", name, "sentence1\tsentence2\tlabel\n")
    load_task("rte", Source(data_dir=tmp_path, allow_download=True))
    assert hub == []


@pytest.mark.parametrize(
    "error", [ConnectionError, RuntimeError, DatasetNotFoundError, ValueError]
)
def test_a_hub_that_does_not_answer_is_named_with_its_reason(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cell is skipped, and told of the other ways."""

    class Unreachable:
        def dataset_info(self, name: str) -> Any:
            raise error(f"cannot reach the hub.\nIt is away: {name}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    with pytest.raises(MissingError) as caught:
        load_task("rte", Source(allow_download=True))
    message = str(caught.value)
    assert "the hub did not give nyu-mll/glue: cannot reach the hub. Ways" in message
    assert "\n" not in message
    assert "`--data DIR`" in message


# Images as a model reads them


def test_gray_images_become_what_the_model_reads() -> None:
    """Its size, its channels, and its mean and deviation; whole gray ones stay so."""
    form = PixelForm(shape=(3, 32, 16), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    dark, light = (
        Image(pixels=torch.full((28, 28), gray, dtype=torch.uint8), label=n, form=form)
        for n, gray in enumerate((0, 255))
    )
    batch = collate([dark, light], 0)
    assert batch["pixel_values"].shape == (2, 3, 32, 16)
    wanted = torch.tensor([[-0.2, -0.8, -0.3], [1.8, 3.2, 0.7]])
    for row, values in zip(batch["pixel_values"], wanted, strict=True):
        torch.testing.assert_close(row, values[:, None, None].expand(3, 32, 16))
    assert batch["labels"].tolist() == [0, 1]


def test_an_image_of_the_size_of_the_model_keeps_its_values() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(16, 16)
    form = PixelForm(shape=(1, 16, 16))
    batch = collate([Image(pixels=pixels, label=0, form=form)], 0)
    wanted = (pixels / 255 - 0.5) / 0.5
    torch.testing.assert_close(batch["pixel_values"][0, 0], wanted)


@pytest.mark.parametrize("backbone", ["random:bert-tiny", "minilm-l6"])
def test_images_for_a_backbone_of_text_are_refused_before_anything_runs(
    backbone: str,
) -> None:
    with pytest.raises(ValueError, match="take a backbone of images, such as"):
        fields.check_together(cell(task="digits", backbone=backbone))
    fields.check_together(cell(task="digits", backbone="random:vit-tiny", seq_len=17))
