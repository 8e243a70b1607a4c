"""Backbones that a sweep trains before the cells that use them."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from harness.own_files import model_in, reviews, write_csv
from meft_bench.parent import cli, harness, runs, sweep
from meft_bench.parent.sweep import Sweep, SweepError
from meft_bench.shared.record import Record, Status

HEAD = 'question = "Does it learn faster when it knows reviews?"\n'
TASK = """
[task.reviews]
train = "csv:reviews.csv"
evaluation = "csv:more.csv"
text = "review"
label = "liked"
"""
TRAINED = """
[backbone.knowing]
from = "dir:bert"
train = { task = "reviews", seq_len = 8, batch_size = 8, max_steps = 120, \
learning_rate = 3e-3 }
"""
MATRIX = """
[[matrix]]
name = "all"
defaults = { backbone = "knowing", task = "reviews", seq_len = 8, max_steps = 4 }
axes = { method = ["full", "head"] }
"""
MORE = reviews(60)[40:]
pytestmark = pytest.mark.filterwarnings("ignore:.* deprecated .* v6:FutureWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_csv(folder / "reviews.csv", reviews())
    write_csv(folder / "more.csv", MORE)
    model_in(folder / "bert")
    (folder / "mine.toml").write_text(HEAD + TASK + TRAINED + MATRIX)
    return folder


@pytest.fixture(scope="module")
def ran(made: Path) -> Path:
    """The records of a run of the sweep, which the tests read."""
    path = made / "ran.jsonl"
    assert cli.main(["run", str(made / "mine.toml"), "-o", str(path)]) == 0
    return path


def load(folder: Path, text: str) -> Sweep:
    path = folder / "other.toml"
    path.write_text(text)
    return sweep.load(str(path), device="cpu")


def folder_of(path: Path) -> Path:
    (folder,) = path.with_suffix(".models").iterdir()
    return folder


def test_a_sweep_has_one_cell_that_trains(made: Path) -> None:
    """All weights of what it is from; the others hold a digest of how."""
    found = load(made, HEAD + TASK + TRAINED + MATRIX)
    (value,) = found.trainings
    assert {cell.backbone for cell in found.cells} == {value}
    assert value.startswith("trained:bert-")
    training = found.trainings[value]
    assert (training.method, training.max_steps) == ("full", 120)
    assert training.backbone.startswith("dir:bert-")
    assert training not in found.cells
    other = load(made, HEAD + TASK + TRAINED.replace("120", "121") + MATRIX)
    assert {*other.trainings}.isdisjoint(found.trainings)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("train = 3", "`train` = 3 should be a table of fields"),
        (
            'train = { task = "reviews", steps = 3 }',
            "unknown key 'steps'.*max_steps",
        ),
        ("train = { max_steps = 3 }", "`train`: no `task`; name what it is trained on"),
        ('train = { task = "review" }', "unknown task 'review'.*reviews"),
        ('train = { task = "sst3" }', "unknown task 'sst3'.*sst2"),
        ('train = { task = "reviews", method = "lora" }', "leave out `method`: every"),
        ('train = { task = "reviews", depth = 1 }', "leave out `depth`"),
        ('train = { task = "reviews", max_steps = 0 }', "`max_steps` = 0"),
        ('train = { task = "reviews", seed = [0, 1] }', "`seed` = "),
        ('trained = { task = "reviews" }', "unknown key 'trained'.*train"),
    ],
)
def test_mistakes_name_the_backbone(made: Path, table: str, words: str) -> None:
    text = f'[backbone.knowing]\nfrom = "dir:bert"\n{table}\n'
    with pytest.raises(SweepError, match=rf"\[backbone.knowing\]: .*{words}"):
        load(made, HEAD + TASK + text + MATRIX)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        (TRAINED.replace('from = "dir:bert"', ""), "`from` = None should be the name"),
        (TRAINED.replace("dir:bert", "dir:bart"), "no directory 'bart'"),
        (TRAINED.replace("dir:bert", "mini"), "unknown backbone 'mini'.*minilm-l6"),
        (TRAINED.replace("knowing", "minilm-l6"), "the suite has a backbone of this"),
        (TRAINED.replace("knowing", "'a b'"), "a name has letters, digits"),
        (
            TRAINED + TRAINED.replace("knowing", "more").replace("dir:bert", "knowing"),
            "`from` is trained by the sweep, too",
        ),
        (
            TRAINED + TRAINED.replace("knowing", "idle").replace("120", "9"),
            "by no",
        ),
        (TRAINED.replace("dir:bert", "random:bert-tiny"), "no tokenizer to read text"),
    ],
)
def test_mistakes_of_tables(made: Path, tables: str, words: str) -> None:
    with pytest.raises(SweepError, match=words):
        load(made, HEAD + TASK + tables + MATRIX)


def test_it_is_trained_once_and_first(ran: Path) -> None:
    """And what cells load is what was scored."""
    training, *others = runs.read(ran)
    assert training.status == Status.OK
    assert training.cell.max_steps == 120
    assert {record.cell.method for record in others} == {"full", "head"}
    file = folder_of(ran) / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for record in others:
        assert record.status == Status.OK
        assert record.environment.weights_origin == f"trained by {training.cell.id}"
        assert record.environment.weights_sha256 == digest
        assert (record.aliases or {})[record.cell.backbone] == "knowing"
    assert "/" not in training.cell.id.split("/")[1]
    score = training.measurement.score
    assert score is not None
    assert score > (training.measurement.majority_score or 1)
    before = runs.read(ran)
    assert cli.main(["run", str(ran.parent / "mine.toml"), "-o", str(ran)]) == 0
    assert runs.read(ran) == before


def test_its_weights_are_those_that_were_scored(ran: Path) -> None:
    """Read by transformers alone, they have the score of the record."""
    folder = folder_of(ran)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    read = AutoTokenizer.from_pretrained(folder)
    right = []
    for row in MORE:
        inputs = read(row["review"], truncation=True, max_length=8, return_tensors="pt")
        with torch.no_grad():
            best = int(model(**inputs).logits.argmax())
        right.append(["no", "yes"][best] == row["liked"])
    training, *_ = runs.read(ran)
    assert right == [bool(r) for r in training.measurement.right_rows or ()]


def test_a_directory_of_the_same_weights_gives_the_same_bits(ran: Path) -> None:
    text = (HEAD + TASK + MATRIX).replace("knowing", f"dir:{folder_of(ran)}")
    path = ran.parent / "plain.toml"
    path.write_text(text)
    plain = ran.parent / "plain.jsonl"
    assert cli.main(["run", str(path), "-o", str(plain)]) == 0
    mine = {r.cell.method: r.measurement.loss_curve for r in runs.read(ran)[1:]}
    its = {r.cell.method: r.measurement.loss_curve for r in runs.read(plain)}
    assert mine == its


def with_one_cell_less(made: Path, ran: Path, name: str) -> Path:
    """Records and weights of the run, in which the last cell has not run."""
    path = made / f"{name}.jsonl"
    lines = ran.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    shutil.copytree(ran.with_suffix(".models"), path.with_suffix(".models"))
    return path


@pytest.mark.parametrize("what", ["gone", "empty", "cut", "changed", "without digest"])
def test_weights_that_are_not_whole_are_trained_again(
    what: str, made: Path, ran: Path
) -> None:
    """Their bits are the same, so that cells that are recorded stay so."""
    path = with_one_cell_less(made, ran, f"again-{what.split()[0]}")
    folder = folder_of(path)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if what == "gone":
        shutil.rmtree(folder)
    elif what == "empty":
        for file in folder.iterdir():
            file.unlink()
    elif what == "cut":
        weights.write_bytes(content[:-100])
    elif what == "changed":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        (folder / "weights.sha256").unlink()
    assert cli.main(["run", str(made / "mine.toml"), "-o", str(path)]) == 0
    assert len(runs.read(path)) == len(runs.read(ran)) - 1 + 2
    assert (folder_of(path) / "model.safetensors").read_bytes() == content


def test_lost_weights_that_nothing_needs_stay_lost(made: Path, ran: Path) -> None:
    path = made / "nothing.jsonl"
    shutil.copy(ran, path)
    assert cli.main(["run", str(made / "mine.toml"), "-o", str(path)]) == 0
    assert runs.read(path) == runs.read(ran)
    assert not path.with_suffix(".models").exists()


def test_cells_that_ran_on_other_weights_run_again(
    made: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With those of another training in the place of theirs."""
    path = with_one_cell_less(made, ran, "other")
    other = made / "longer.toml"
    text = HEAD + TASK + TRAINED.replace("120", "20") + MATRIX
    other.write_text(text)
    longer = made / "longer.jsonl"
    assert cli.main(["run", str(other), "-o", str(longer)]) == 0
    shutil.rmtree(folder_of(path))
    shutil.copytree(
        folder_of(longer),
        folder_of(ran).parent.parent
        / path.with_suffix(".models").name
        / folder_of(ran).name,
    )
    assert cli.main(["list", str(made / "mine.toml"), "-o", str(path)]) == 0
    assert "3 cells, 1 done" in capsys.readouterr().out
    assert cli.main(["run", str(made / "mine.toml"), "-o", str(path)]) == 0
    last = {record.cell.method: record for record in runs.read(path)[2:]}
    file = folder_of(longer) / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert {r.environment.weights_sha256 for r in last.values()} == {digest}
    assert {*last} == {"full", "head"}


def test_a_training_may_be_a_cell_of_the_matrix(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs once, also by force."""
    own = """
[[matrix]]
name = "own"
defaults = { method = "full", backbone = "dir:bert", task = "reviews", seq_len = 8, \
batch_size = 8, max_steps = 120, learning_rate = 3e-3 }
"""
    (made / "both.toml").write_text(HEAD + TASK + TRAINED + MATRIX + own)
    words = [str(made / "both.toml"), "-o", str(made / "both.jsonl")]
    assert cli.main(["list", *words]) == 0
    assert "3 cells, 0 done" in capsys.readouterr().out
    assert cli.main(["run", *words, "--force"]) == 0
    assert len(runs.read(made / "both.jsonl")) == 3


def test_where_the_training_fails_nothing_else_runs(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (HEAD + TASK + TRAINED + MATRIX).replace("seq_len = 8,", "seq_len = 64,", 1)
    (made / "fails.toml").write_text(text)
    path = made / "fails.jsonl"
    code = cli.main(["run", str(made / "fails.toml"), "-o", str(path)])
    assert code == harness.EXIT_FAILED
    (record,) = runs.read(path)
    assert record.status == Status.ERROR
    assert "training of their backbone knowing failed" in capsys.readouterr().err


def test_only_and_list_have_the_training_of_what_is_selected(
    made: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["list", str(made / "mine.toml"), "--only", "head"]
    assert cli.main([*words, "-o", str(ran)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines[:2]] == ["done  full", "done  head"]
    assert lines[-1].startswith("2 cells, 2 done")


def test_a_plan_of_a_virtual_gpu_needs_no_training(made: Path) -> None:
    path = made / "virtual.jsonl"
    words = ["run", str(made / "mine.toml"), "--device", "virtual-H100"]
    assert cli.main([*words, "-o", str(path)]) == 0
    found = runs.read(path)
    assert [record.cell.method for record in found] == ["full", "head"]
    assert {record.status for record in found} == {Status.OK}
    assert not path.with_suffix(".models").exists()


@pytest.mark.slow
def test_trials_and_images(tmp_path: Path) -> None:
    """A backbone of images, used by cells that wait for trials."""
    path = tmp_path / "images.toml"
    path.write_text(
        HEAD
        + """
[backbone.digits]
from = "random:vit-tiny"
train = { task = "digits", seq_len = 17, batch_size = 32, max_steps = 20 }
[[matrix]]
name = "all"
defaults = { backbone = "digits", task = "digits", seq_len = 17, max_steps = 3 }
axes = { method = ["lora", "meft1-exact"] }
tune = { learning_rate = [1e-3, 1e-2] }
"""
    )
    assert cli.main(["run", str(path), "-o", str(tmp_path / "runs.jsonl")]) == 0
    found: list[Record] = runs.read(tmp_path / "runs.jsonl")
    assert len(found) == 1 + 4 + 2
    assert {record.status for record in found} == {Status.OK}
    form = json.loads(
        (folder_of(tmp_path / "runs.jsonl") / "preprocessor_config.json").read_text()
    )
    assert form == {"image_mean": [0.5], "image_std": [0.5]}


@pytest.mark.parametrize("where", ["the training", "the cells"])
def test_the_number_of_tokens_of_an_image_is_checked_first(
    where: str, made: Path
) -> None:
    """Of a shape, and of what is trained from it."""
    right = ", seq_len = 17"
    train, its = ("", right) if where == "the training" else (right, "")
    text = HEAD + (
        '[backbone.seeing]\nfrom = "random:vit-tiny"\n'
        f'train = {{ task = "digits"{train} }}\n'
        '[[matrix]]\nname = "all"\n'
        f'defaults = {{ backbone = "seeing", task = "digits", method = "full"{its} }}\n'
    )
    with pytest.raises(SweepError, match=r"`seq_len` = 128 with `backbone` = .*to 17"):
        load(made, text)
