"""What a sweep takes from its user: digests in the place of paths, checked first."""

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from harness.own_files import LORA, model_in, questions, reviews, write_csv, write_jsonl
from meft_bench.child.methods import peft_config
from meft_bench.child.scoring.rules import METRICS as ANSWER_METRICS
from meft_bench.child.tasks.metrics import METRICS as LABEL_METRICS
from meft_bench.parent import cli, selection, sweep
from meft_bench.parent.engines import isolate
from meft_bench.parent.own import current, packages, tasks
from meft_bench.parent.own.methods import find as find_method
from meft_bench.parent.sweep import Sweep, SweepError
from meft_bench.shared import own
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Environment, Status
from meft_bench.shared.row_kinds import KINDS

MINE = """
from missing_package import nothing

def method(model, cell):
    return model

def metric(predictions, references):
    return 1.0

def load(cell, source):
    return None
"""
HEAD = 'question = "Why?"\n'
MATRIX = HEAD + "[[matrix]]\nname = 'one'\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that no test changes; making the models takes longest."""
    folder = tmp_path_factory.mktemp("made")
    write_csv(folder / "reviews.csv", reviews())
    write_csv(folder / "more.csv", reviews(44)[40:])
    write_jsonl(folder / "questions.jsonl", questions())
    (folder / "lora.json").write_text(json.dumps(LORA))
    (folder / "mine.py").write_text(MINE)
    model_in(folder / "bert")
    model_in(folder / "ernie", "ernie")
    saved = datasets.Dataset.from_list(reviews())
    saved.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(folder / "splits"))
    saved.to_parquet(str(folder / "reviews.parquet"))
    return folder


def load(folder: Path, text: str) -> Sweep:
    (folder / "mine.toml").write_text(text)
    return sweep.load(str(folder / "mine.toml"), device="cpu")


def cells(folder: Path, text: str) -> tuple[Cell, ...]:
    return load(folder, text).cells


def matrix(**fields: object) -> str:
    """A matrix with one value per field."""
    values = {"method": "full", **fields}
    shown = ", ".join(f"{name} = {json.dumps(v)}" for name, v in values.items())
    return MATRIX + f"defaults = {{ {shown} }}\n"


def test_a_cell_holds_digests_and_no_path(made: Path) -> None:
    """Of the method, the backbone, the task and the reference."""
    text = matrix(
        method="peft:lora.json",
        backbone="dir:bert",
        task="csv:reviews.csv",
        reference="python:mine.py:method",
    )
    text += "[task.reviews]\ntrain='csv:reviews.csv'\ntext='review'\nlabel='liked'\n"
    chosen = load(made, text.replace('"csv:reviews.csv"', '"reviews"'))
    (cell,) = chosen.cells
    for value in (cell.method, cell.backbone, cell.task, cell.reference):
        assert own.is_value(value)
        assert own.is_value(chosen.own[value].value)
    assert cell.method.startswith("peft:lora-")
    assert cell.backbone.startswith("dir:bert-")
    assert cell.task.startswith("data:classification-")
    assert cell.reference.startswith("python:method-")
    assert str(made) not in cell.id + json.dumps(cell.to_json())
    located = own.located(cell, chosen.own)
    assert located.method == f"peft:{made / 'lora.json'}"
    assert located.backbone == f"dir:{made / 'bert'}"
    rows = own.rows_of(cell, chosen.own)
    assert rows is not None
    assert rows["train"] == f"csv:{made / 'reviews.csv'}"
    assert own.aliases_of(cell, chosen.own) == {
        cell.method: "peft:lora.json",
        cell.backbone: "dir:bert",
        cell.task: "reviews",
        cell.reference: "python:mine.py:method",
    }


@pytest.mark.parametrize(
    ("field", "text", "name", "change"),
    [
        ("method", "peft:lora.json", "lora.json", lambda old: old.replace("8", "4")),
        ("method", "python:mine.py:method", "mine.py", lambda old: old + "\n# new"),
        ("backbone", "dir:bert", "bert/config.json", lambda old: old + "\n"),
        (
            "backbone",
            "random:bert/config.json",
            "bert/config.json",
            lambda old: old + " ",
        ),
        ("task", "jsonl:questions.jsonl", "questions.jsonl", lambda o: o.upper()),
    ],
)
def test_equal_content_is_the_same_cell_anywhere(
    made: Path, tmp_path: Path, field: str, text: str, name: str, change: object
) -> None:
    """Under any path and alias; changed content is another cell."""
    other = tmp_path / "elsewhere"
    shutil.copytree(made, other)
    fields = (
        {field: text} if text[:6] != "random" else {field: text, "task": "synthetic"}
    )
    (cell,) = cells(made, matrix(**fields))
    (same,) = cells(other, matrix(**fields))
    assert same.key == cell.key
    alias = f"[{field}.short]\n" + (
        f"train = '{text}'\n" if field == "task" else f"from = '{text}'\n"
    )
    (named,) = cells(other, matrix(**fields | {field: "short"}) + alias)
    assert named.key == cell.key
    path = other / name
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    try:
        (changed,) = cells(other, matrix(**fields))
    except SweepError:  # upper-case keys of JSON are other columns
        assert field == "task"
        return
    assert changed.key != cell.key


def test_the_layout_of_a_config_is_no_content(made: Path, tmp_path: Path) -> None:
    """Nor are the fields that say where an adapter is from."""
    fields = {**LORA, "base_model_name_or_path": "/home/me", "peft_version": "0.1"}
    (tmp_path / "a.json").write_text(
        json.dumps(dict(reversed(fields.items())), indent=4)
    )
    mine, same = (
        find_method("peft:lora.json", made),
        find_method("peft:a.json", tmp_path),
    )
    assert mine is not None
    assert same is not None
    assert mine.value == same.value


def test_an_alias_selects_cells(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a method, a backbone or a task; so does the end of a path."""
    text = MATRIX + "axes = { method = ['full', 'mine', 'peft:lora.json'] }\n"
    chosen = load(made, text + "[method.mine]\nfrom = 'python:mine.py:method'\n")
    (cell,) = selection.select(chosen, "mine")
    assert cell.method.startswith("python:method-")
    with pytest.raises(selection.UsageError, match="did you mean 'mine'"):
        selection.select(chosen, "mind")


def test_conditions_name_things_of_the_user(made: Path) -> None:
    """In `set`, `exclude` and `zip`, as in axes."""
    text = MATRIX + "axes = { method = ['full', 'mine', 'peft:lora.json'] }\n"
    text += "[[matrix.set]]\nwhen = { method = 'mine' }\nlora_rank = 4\n"
    text += "[[matrix.exclude]]\nmethod = 'peft:lora.json'\n"
    text += "[method.mine]\nfrom = 'python:mine.py:method'\n"
    full, mine = cells(made, text)
    assert (full.lora_rank, mine.lora_rank) == (8, 4)


@pytest.mark.parametrize(
    "name", ["csv:reviews.csv", "parquet:reviews.parquet", "dataset:saved"]
)
def test_rows_have_the_same_kinds_in_every_format(made: Path, name: str) -> None:
    task = tasks.in_full({"train": name, "text": "review", "label": "liked"}, made)
    assert task.value.startswith("data:classification-")
    assert task.rows is not None
    assert task.rows["evaluation"] == 0.2
    assert task.rows["metric"] == "accuracy"


def test_the_kind_follows_from_the_columns(made: Path) -> None:
    """Unless it is named; regression always is."""
    kinds = {
        "jsonl:questions.jsonl": ({}, "options"),
        "csv:reviews.csv": ({"text": "review"}, "language-modelling"),
        "parquet:reviews.parquet": (
            {"text": "review", "label": "stars", "kind": "regression"},
            "regression",
        ),
    }
    for place, (fields, kind) in kinds.items():
        task = tasks.in_full({"train": place, **fields}, made)
        assert task.rows is not None
        assert task.rows["kind"] == kind


def test_metrics_are_those_of_the_suite() -> None:
    """The parent checks their names, and the child computes them."""
    assert {*KINDS["classification"].metrics} <= {*LABEL_METRICS}
    named = {*KINDS["options"].metrics, *KINDS["generation"].metrics}
    assert named <= {*ANSWER_METRICS}


ROWS = "[task.mine]\ntrain = 'csv:reviews.csv'\ntext = 'review'\nlabel = 'liked'\n"
TASK = matrix(task="mine")
BAD = {
    "no config": (matrix(method="peft:none.json"), "there is no file", "none.json"),
    "a mistyped type": (matrix(method="peft:lo-ra"), "peft:TYPE", "peft:FILE.json"),
    "no JSON": (matrix(method="peft:broken.json"), "broken.json is not JSON"),
    "no peft_type": (matrix(method="peft:empty.json"), "names no `peft_type`"),
    "a list": (matrix(method="peft:list.json"), "is not a JSON object"),
    "AdaLoRA": (matrix(method="peft:adalora"), "ADALORA changes its ranks"),
    "data to start from": (
        matrix(method="peft:eva.json"),
        "`init_lora_weights` = 'eva'",
    ),
    "no function": (matrix(method="python:mine.py"), "python:FILE.py:FUNCTION"),
    "no file": (matrix(method="python:none.py:method"), "there is no file"),
    "a mistyped function": (
        matrix(method="python:mine.py:methd"),
        "mine.py defines no 'methd'; did you mean 'method'?",
    ),
    "no Python": (matrix(method="python:broken.py:method"), "broken.py", "invalid"),
    "no module": (
        matrix(method="python:no_such_package.here:method"),
        "no module 'no_such_package' is installed",
    ),
    "a module of the working directory": (
        matrix(method="python:mine:method"),
        "no module 'mine' is installed; a file of your own is named by its path",
    ),
    "no directory": (matrix(backbone="dir:none"), "no directory 'none'"),
    "no model": (matrix(backbone="dir:saved"), "config.json does not exist"),
    "a family that is not known": (
        matrix(method="meft1", backbone="dir:ernie"),
        "`method` = 'meft1' needs a family",
        "backbone 'dir:ernie' is of model_type 'ernie'",
    ),
    "its MLPs": (
        matrix(backbone="dir:ernie", mlp_chunks=2),
        "`mlp_chunks` = 2 needs a family",
    ),
    "MLPs of adapters": (
        matrix(method="adapters", mlp_chunks=2),
        "`mlp_chunks` = 2 with `method` = 'adapters'",
        "cannot run MLPs in parts",
    ),
    "chunks of a classifier": (
        matrix(task="mine", loss_chunk_tokens=8) + ROWS,
        "`loss_chunk_tokens` = 8 with `task` = 'mine', whose models are classifiers",
    ),
    "an alias of nothing": (matrix(method="min"), "unknown method 'min'"),
    "near an alias": (
        matrix(method="mind") + "[method.mine]\nfrom = 'peft:lora.json'\n",
        "unknown method 'mind'; did you mean 'mine'?",
    ),
    "an alias of ours": (
        matrix() + "[method.lora]\nfrom = 'peft:lora.json'\n",
        "[method.lora]: the suite has a method of this name",
    ),
    "an alias with a path": (
        matrix() + "[method.'a/b']\nfrom = 'peft:lora.json'\n",
        "[method.a/b]: a name has letters",
    ),
    "an idle alias": (
        matrix() + "[method.mine]\nfrom = 'peft:lora.json'\n",
        "[method.mine] is named by no matrix",
    ),
    "two aliases": (
        MATRIX
        + "axes = { method = ['a', 'b'] }\n[method.a]\nfrom = 'peft:lora.json'\n"
        + "[method.b]\nfrom = 'peft:lora.json'\n",
        "methods 'a' and 'b' have the same content",
    ),
    "no from": (
        matrix() + "[method.mine]\n",
        "`from` = None should be 'peft:FILE.json'",
    ),
    "from one of ours": (
        matrix() + "[backbone.mine]\nfrom = 'minilm-l6'\n",
        "`from` = 'minilm-l6' should be 'dir:PATH'",
    ),
    "a mistyped from": (
        matrix() + "[method.mine]\nform = 'x'\n",
        "unknown key 'form'; did you mean 'from'?",
    ),
    "no tables": (matrix().replace(HEAD, HEAD + "task = 1\n"), "[task.NAME]"),
    "no table": (HEAD + "[task]\nmine = 1\n", "'mine' = 1 should be a table"),
    "no rows": (matrix(task="csv:none.csv"), "`train`: there is no file 'none.csv'"),
    "an empty file": (matrix(task="csv:empty.csv"), "file 'empty.csv' is empty"),
    "no kind": (
        matrix(task="csv:reviews.csv"),
        "the columns review, liked, stars show no kind of task",
    ),
    "splits": (
        matrix(task="dataset:splits"),
        "'splits' has the splits train: name one, as dataset:splits/train",
    ),
    "no dataset": (matrix(task="dataset:bert"), "'bert' has no dataset_info.json"),
    "no Parquet": (matrix(task="parquet:lora.json"), "lora.json: not Parquet"),
    "no JSON lines": (matrix(task="jsonl:reviews.csv"), "the first line is not JSON"),
    "two columns": (matrix(task="csv:twice.csv"), "has two columns 'text'"),
    "no train": (TASK + "[task.mine]\nkind = 'options'\n", "[task.mine]: no `train`"),
    "a mistyped key": (
        TASK + ROWS + "lable = 'x'\n",
        "unknown key 'lable'; did you mean 'label'?",
    ),
    "a mistyped column": (
        TASK + ROWS.replace("'liked'", "'likd'"),
        "`label`: the file of `train` has no column 'likd'; did you mean 'liked'?",
    ),
    "a mistyped kind": (
        TASK + ROWS + "kind = 'clasification'\n",
        "unknown kind 'clasification'; did you mean 'classification'?",
    ),
    "a field of another kind": (
        TASK + ROWS + "prompt = 'review'\n",
        "`prompt` is no field of kind 'classification'",
    ),
    "a column of numbers": (TASK + ROWS + "text_pair = 1\n", "the name of a column"),
    "the same rows twice": (
        TASK + ROWS + "evaluation = 'csv:reviews.csv'\n",
        "`train` and `evaluation` have the same content",
    ),
    "a share of all": (TASK + ROWS + "evaluation = 1.0\n", "a number between 0 and 1"),
    "a mistyped metric": (
        TASK + ROWS + "metric = 'acuracy'\n",
        "unknown metric 'acuracy' of kind 'classification'; did you mean 'accuracy'?",
    ),
    "a metric of the hub": (
        TASK + ROWS + "metric = 'evaluate:accuracy'\n",
        "evaluate would fetch it from the hub",
    ),
    "a metric without a function": (
        TASK + ROWS + "metric = 'python:mine.py:metrik'\n",
        "mine.py defines no 'metrik'; did you mean 'metric'?",
    ),
    "a metric of text": (
        TASK
        + "[task.mine]\ntrain = 'csv:reviews.csv'\ntext = 'review'\n"
        + "metric = 'python:mine.py:metric'\n",
        "is scored by the likelihood of its tokens",
    ),
    "tokens of classes": (
        TASK + ROWS + "max_new_tokens = 3\n",
        "`max_new_tokens` = 3 has no effect in kind 'classification'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_line(made: Path, tmp_path: Path, name: str) -> None:
    """It names the sweep, the part and what to write instead."""
    folder = tmp_path / "here"
    folder.mkdir()
    for path in made.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "broken.json").write_text("{")
    (folder / "empty.json").write_text("{}")
    (folder / "list.json").write_text("[]")
    (folder / "eva.json").write_text(json.dumps(LORA | {"init_lora_weights": "eva"}))
    (folder / "broken.py").write_text("def method(:\n")
    (folder / "empty.csv").write_text("")
    (folder / "twice.csv").write_text("text,text\na,b\n")
    text, *expected = BAD[name]
    with pytest.raises(SweepError) as caught:
        load(folder, text)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder / "mine.toml") in message
    for words in expected:
        assert words in message


def peft_folder(folder: Path, **training: object) -> str:
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "experiment" / "adapter_config.json").write_text(json.dumps(LORA))
    parameters = folder / "experiment" / "training_params.json"
    parameters.write_text(json.dumps(training))
    return matrix(method="peft:experiment")


def test_training_parameters_are_fields_of_the_cell(tmp_path: Path) -> None:
    """As PEFT's comparison of methods has them in a folder."""
    text = peft_folder(
        tmp_path,
        optimizer_kwargs={"lr": 1e-3, "weight_decay": 0.1},
        optimizer_type="AdamW",
        batch_size=4,
        max_steps=50,
        max_seq_length=64,
        eval_steps=10,
        seed=3,
        dtype="bfloat16",
        compile=False,
        grad_norm_clip=1.0,
        attn_implementation=None,
    )
    (cell,) = cells(tmp_path, text)
    assert cell == Cell(
        method=cell.method,
        learning_rate=1e-3,
        batch_size=4,
        max_steps=50,
        seq_len=64,
        eval_every=10,
        seed=3,
        dtype="bf16",
        weights_dtype="bf16",
    )
    assert cell.method.startswith("peft:lora-")
    chosen = load(tmp_path, text)
    assert current.why_not(cell, chosen.own) == ""
    assert peft_config.read(own.located(cell, chosen.own).method) == LORA
    peft_folder(tmp_path, batch_size=8)
    assert "has changed" in current.why_not(cell, chosen.own)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"optimizer_kwargs": {"lr": "1e-3"}}, "`learning_rate` = '1e-3' should be a"),
        ({"batch_size": 0}, "`batch_size` = 0 should be at least 1"),
        ({"seed": 1.5}, "`seed` = 1.5 should be an integer"),
    ],
)
def test_training_parameters_have_values_of_fields(
    tmp_path: Path, training: dict[str, object], words: str
) -> None:
    with pytest.raises(
        SweepError, match="training parameters of 'peft:experiment'"
    ) as e:
        cells(tmp_path, peft_folder(tmp_path, **training))
    assert words in str(e.value)


def test_a_reference_has_no_training_parameters(tmp_path: Path) -> None:
    text = peft_folder(tmp_path, optimizer_kwargs={"lr": 1e-3})
    text = text.replace('method = "peft', 'method = "full", reference = "peft')
    with pytest.raises(SweepError, match="`reference` = 'peft:experiment' has"):
        cells(tmp_path, text)


def test_folders_that_differ_in_training_alone_are_two_methods(tmp_path: Path) -> None:
    """As the learning rates of PEFT's comparison do."""
    text = MATRIX + "axes = { method = ['peft:a', 'peft:b'] }\n"
    for name, rate in (("a", 1e-3), ("b", 5e-3)):
        peft_folder(tmp_path, optimizer_kwargs={"lr": rate})
        (tmp_path / "experiment").rename(tmp_path / name)
    first, second = cells(tmp_path, text)
    assert (first.learning_rate, second.learning_rate) == (1e-3, 5e-3)
    assert first.method != second.method


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"lr": 1e-3}, "unknown training parameter 'lr'"),
        ({"optimizer_type": "lora-fa"}, "`optimizer_type` = 'lora-fa', but"),
        (
            {"optimizer_kwargs": {"weight_decay": 0.0}},
            "`optimizer_kwargs.weight_decay` = 0.0",
        ),
        ({"optimizer_kwargs": {"r": 32}}, "`optimizer_kwargs.r` = 32"),
        ({"lr_scheduler": "cosine"}, "the learning rate falls linearly here"),
        ({"grad_norm_clip": 0.5}, "every method is trained with 1 here"),
        ({"model_id": "meta-llama/Llama-3.2-3B"}, "the sweep names it as `backbone`"),
        ({"generation_kwargs": {}}, "the task of the sweep decides it"),
        ({"dtype": "int8"}, "it can be float32, bfloat16, float16 here"),
    ],
)
def test_training_parameters_are_never_passed_over(
    tmp_path: Path, training: dict[str, object], words: str
) -> None:
    with pytest.raises(SweepError) as caught:
        cells(tmp_path, peft_folder(tmp_path, **training))
    assert words in str(caught.value)
    assert "training_params.json" in str(caught.value)


def test_a_sweep_does_not_contradict_training_parameters(tmp_path: Path) -> None:
    """A field may be in both if it has the same value."""
    text = peft_folder(tmp_path, optimizer_kwargs={"lr": 1e-3})
    both = text.replace("method", "learning_rate = 1e-3, method")
    assert cells(tmp_path, both) == cells(tmp_path, text)
    other = text.replace("method", "learning_rate = 5e-4, method")
    expected = "`learning_rate` = 0.0005 in the sweep, and the training parameters of"
    with pytest.raises(SweepError, match=expected):
        cells(tmp_path, other)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with entry points that cannot be imported, on the path."""
    package = tmp_path / "site" / "my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('in the parent')\n")
    (package / "code.py").write_text(MINE)
    info = tmp_path / "site" / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n"
    )
    (info / "entry_points.txt").write_text(
        "[meft_bench.methods]\ntheirs = my_package.code:method\n"
        "[meft_bench.tasks]\ncontracts = my_package.code:load\n"
        "[meft_bench.metrics]\nkappa = my_package.code:metric\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    packages._entry_points.cache_clear()
    yield package
    packages._entry_points.cache_clear()


def test_packages_add_names(made: Path, installed: Path) -> None:
    """They are found without importing the package; its code is part of the cell."""
    text = matrix(method="theirs", task="contracts")
    chosen = load(made, text)
    (cell,) = chosen.cells
    assert cell.method.startswith("python:method-")
    assert cell.task.startswith("python:load-")
    assert own.located(cell, chosen.own).method == "python:my_package.code:method"
    assert own.aliases_of(cell, chosen.own)[cell.method] == "theirs"
    assert "my_package" not in sys.modules
    (scored,) = cells(made, matrix(task="mine") + ROWS + "metric = 'kappa'\n")
    assert scored.task.startswith("data:classification-")
    (installed / "helper.py").write_text("# new\n")
    (changed,) = cells(made, text)
    assert changed.method != cell.method
    with pytest.raises(
        SweepError, match="unknown method 'their'; did you mean 'theirs'"
    ):
        cells(made, matrix(method="their"))


def test_a_file_that_changes_is_an_error_of_later_cells(
    made: Path, tmp_path: Path
) -> None:
    """The record would otherwise name the content that the sweep was read with."""
    other = tmp_path / "elsewhere"
    shutil.copytree(made, other)
    text = matrix(method="peft:lora.json", backbone="dir:bert", task="mine") + ROWS
    chosen = load(other, text)
    (cell,) = chosen.cells
    assert current.why_not(cell, chosen.own) == ""
    for name in ("lora.json", "bert/config.json", "reviews.csv"):
        before = (other / name).read_bytes()
        changed = before.replace(b"8", b"44") + b"\n"
        (other / name).write_bytes(changed.replace(b"good", b"bad"))
        assert "has changed since the sweep was read" in current.why_not(
            cell, chosen.own
        )
        (other / name).write_bytes(before)
    (other / "lora.json").unlink()
    assert "there is no file" in current.why_not(cell, chosen.own)


def test_a_list_of_things_of_the_user_imports_nothing_heavy(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither torch nor the user's code, which cannot even be imported."""
    text = matrix(method="python:mine.py:method", backbone="dir:bert", task="mine")
    load(made, text + ROWS)
    monkeypatch.chdir(made)
    assert cli.main(["list", "mine.toml", "--device", "cpu"]) == 0
    assert "python:method-" in capsys.readouterr().out


def test_a_cell_of_a_changed_file_starts_no_child(
    made: Path, tmp_path: Path, here: Environment
) -> None:
    """It is recorded as an error, with what to do."""
    shutil.copy(made / "lora.json", tmp_path)
    chosen = load(tmp_path, matrix(method="peft:lora.json"))
    (cell,) = chosen.cells
    (tmp_path / "lora.json").write_text(json.dumps(LORA | {"r": 4}))
    record = isolate.run(
        cell,
        sweep="mine",
        environment=here,
        options=ChildOptions(),
        timeout_seconds=1,
        folder=tmp_path,
        stop=threading.Event(),
        own=chosen.own,
        worker_module="there.is.no.such.module",
    )
    assert record.status == Status.ERROR
    assert record.message == (
        "peft:lora.json has changed since the sweep was read: run the same command "
        "again, for its new content"
    )
    assert record.aliases == {cell.method: "peft:lora.json"}


@pytest.mark.parametrize("name", ["adalora", "eva.json"])
def test_what_cannot_be_trained_can_be_planned(tmp_path: Path, name: str) -> None:
    (tmp_path / "eva.json").write_text(json.dumps(LORA | {"init_lora_weights": "eva"}))
    found = find_method(f"peft:{name}", tmp_path)
    assert found is not None
    with pytest.raises(SweepError, match="method 'peft:"):
        load(tmp_path, matrix(method=f"peft:{name}"))
