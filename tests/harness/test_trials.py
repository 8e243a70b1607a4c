"""Trials: learning rates are chosen by scores on rows set aside."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meft_bench.child.worker import run
from meft_bench.parent import cli, harness, runs, sweep, trials
from meft_bench.parent.sweep import SweepError
from meft_bench.shared import protocol
from meft_bench.shared.cell import Cell
from meft_bench.shared.measurement import Measurement
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Environment, Record, Status

RATES = (1e-4, 1e-3, 1e-2)
SWEEP = """
question = "Which method is best at its best rate?"
[[matrix]]
name = "all"
axes = {{method = ["head", "lora"], seed = [0, 1]}}
{tune}
[matrix.defaults]
backbone = "minilm-l6"
task = "bbc-news"
max_steps = 3
warmup_steps = 1
"""
TUNE = "tune = {learning_rate = [1e-4, 1e-3, 1e-2]}"


def write(folder: Path, tune: str = TUNE, more: str = "") -> str:
    path = folder / "mine.toml"
    path.write_text(SWEEP.format(tune=tune) + more)
    return str(path)


def test_every_method_has_a_trial_for_each_value(tmp_path: Path) -> None:
    """With a seed that no result has, scored on rows set aside."""
    found = sweep.load(write(tmp_path), device="cpu")
    assert found.cells == ()
    assert [tuning.trials[0].method for tuning in found.tunings] == ["head", "lora"]
    for tuning in found.tunings:
        assert [trial.learning_rate for trial in tuning.trials] == [*RATES]
        assert {trial.seed for trial in tuning.trials} == {protocol.TRIAL_SEED}
        assert {trial.scored_on for trial in tuning.trials} == {"validation"}
        assert [cell.seed for cell in tuning.cells] == [0, 1]
        assert {cell.scored_on for cell in tuning.cells} == {"evaluation"}


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ("tune = {learning_rate = [1e-3]}", "has one value to try"),
        ("tune = {learning_rate = [1e-3, 1e-3]}", "names a value twice"),
        ("tune = {depth = [1, 2]}", "is not chosen by trials"),
        ("tune = {lora_rank = [4, 8]}", "'head' does not use `lora_rank`"),
        ("tune = {learning = [4, 8]}", "unknown key 'learning'"),
        ("tune = {learning_rate = 1}", "should be a list"),
        ("tune = {max_steps = [2, 3]}", "given twice"),
        ("trial_seeds = 2", "without `tune`: name values to try"),
        (f"{TUNE}\ntrial_seeds = 0", "should be an integer of at least 1"),
        (f"{TUNE}\ntrial_seeds = true", "should be an integer of at least 1"),
        (f"{TUNE}\ntrial_extensions = -1", "should be an integer of at least 0"),
        ("trial_extensions = 1", "but there is no `tune`"),
        (
            "tune = {batch_size = [4, 8]}\ntrial_extensions = 1",
            "is for trials of `learning_rate` alone, but `tune` names batch_size",
        ),
    ],
)
def test_what_cannot_be_tried_is_refused(tmp_path: Path, tune: str, words: str) -> None:
    with pytest.raises(SweepError, match=words):
        sweep.load(write(tmp_path, tune), device="cpu")


def test_methods_have_equally_many_trials(tmp_path: Path) -> None:
    """Of all matrices of a sweep."""
    other = SWEEP.format(tune="tune = {learning_rate = [1e-4, 1e-3]}")
    other = other.partition("\n[[matrix]]")[2].replace('"all"', '"other"')
    other = other.replace('"head", "lora"', '"full"')
    with pytest.raises(SweepError, match="with 2 and 3 values to try"):
        sweep.load(write(tmp_path, more=f"[[matrix]]{other}"), device="cpu")


def test_tasks_without_a_score_have_no_trials(tmp_path: Path) -> None:
    text = Path(write(tmp_path)).read_text().replace("bbc-news", "synthetic")
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(SweepError, match="has no score to choose by"):
        sweep.load(str(tmp_path / "mine.toml"), device="cpu")


def record_of(
    here: Environment, trial: Cell, score: float | None, second: float | None = None
) -> Record:
    return Record(
        sweep="s",
        cell=trial,
        status=Status.OOM if score is None else Status.OK,
        message="",
        started_at="2026-01-01T00:00:00+00:00",
        wall_seconds=1.0,
        measurement=Measurement(score=score, second_score=second),
        environment=here,
    )


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ((0.1, 0.3, 0.2), 1),
        ((0.3, 0.3, 0.2), 0),
        ((None, 0.1, None), 1),
        ((-0.2, -0.1, None), 1),
        ((None, None, None), None),
    ],
)
def test_the_best_score_chooses(
    here: Environment,
    tmp_path: Path,
    scores: tuple[float | None, ...],
    best: int | None,
) -> None:
    """The first of equal ones; none that failed."""
    (tuning, _) = sweep.load(write(tmp_path), device="cpu").tunings
    records = {
        trial: record_of(here, trial, score)
        for trial, score in zip(tuning.trials, scores, strict=True)
    }
    found = trials.best_of(tuning, records)
    assert found == (None if best is None else tuning.trials[best])
    if found is not None:
        rates = {cell.learning_rate for cell in tuning.cells_with(found)}
        assert rates == {found.learning_rate}


@pytest.mark.parametrize(
    ("second_scores", "best"),
    [((0.1, 0.3, 0.2), 1), ((0.3, 0.3, 0.2), 0), ((None, 0.1, None), 1)],
)
def test_of_equal_scores_the_second_one_chooses(
    here: Environment,
    tmp_path: Path,
    second_scores: tuple[float | None, ...],
    best: int,
) -> None:
    """As of facts that no trial recalls whole, but some in part."""
    (tuning, _) = sweep.load(write(tmp_path), device="cpu").tunings
    records = {
        trial: record_of(here, trial, 0.0, second)
        for trial, second in zip(tuning.trials, second_scores, strict=True)
    }
    assert trials.best_of(tuning, records) == tuning.trials[best]


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ((0.1, 0.5, 0.4, 0.3, 0.2, 0.2), 1),  # means of 0.3, 0.35 and 0.2
        ((0.9, None, 0.4, 0.3, 0.2, 0.2), 1),  # one trial of the first failed
        ((0.3, 0.3, 0.4, 0.2, 0.2, 0.2), 0),
    ],
)
def test_the_mean_over_the_seeds_of_trials_chooses(
    here: Environment,
    tmp_path: Path,
    scores: tuple[float | None, ...],
    best: int,
) -> None:
    """Of values of which no trial failed; results have seeds that no trial has."""
    path = write(tmp_path, f"{TUNE}\ntrial_seeds = 2")
    (tuning, _) = sweep.load(path, device="cpu").tunings
    first = protocol.TRIAL_SEED
    assert [trial.seed for trial in tuning.trials] == [first, first + 1] * 3
    assert [trial.learning_rate for trial in tuning.trials[::2]] == [*RATES]
    records = {
        trial: record_of(here, trial, score)
        for trial, score in zip(tuning.trials, scores, strict=True)
    }
    found = trials.best_of(tuning, records)
    assert found is not None
    assert {cell.learning_rate for cell in tuning.cells_with(found)} == {RATES[best]}
    text = Path(path).read_text().replace("seed = [0, 1]", f"seed = [0, {first + 1}]")
    Path(path).write_text(text)
    with pytest.raises(SweepError, match="is that of trials; take another"):
        sweep.load(path, device="cpu")


def test_cells_run_with_what_their_trials_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a second run, or a listing, repeats nothing."""
    monkeypatch.chdir(tmp_path)
    words = [write(tmp_path), "--device", "cpu", "-o", "mine.jsonl"]
    worker = "harness.workers.fake_scores"
    assert cli.main(["list", *words]) == 0
    assert "then  lora/" in capsys.readouterr().out
    assert cli.main(["run", *words], worker_module=worker) == 0
    records = runs.read(Path("mine.jsonl"))
    assert len(records) == 2 * 3 + 2 * 2
    results = [r.cell for r in records if r.cell.scored_on == "evaluation"]
    # The fake score is the larger the nearer a rate is to that of its method.
    assert {(c.method, c.learning_rate) for c in results} == {
        ("head", 1e-2),
        ("lora", 1e-3),
    }
    assert cli.main(["run", *words], worker_module=worker) == 0
    assert len(runs.read(Path("mine.jsonl"))) == len(records)
    capsys.readouterr()
    assert cli.main(["list", *words]) == 0
    assert "10 cells, 10 done" in capsys.readouterr().out
    only = [*words, "--only", "head"]
    assert cli.main(["list", *only]) == 0
    assert "5 cells, 5 done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("most", "rates", "num_trials"),
    [
        (0, {"head": 1e-4, "lora": 1e-4}, 2 + 2),
        (1, {"head": 1e-3, "lora": 1e-3}, 3 + 3),
        # One beyond the best shows that it is no end.
        (3, {"head": 1e-2, "lora": 1e-3}, 5 + 4),
    ],
)
def test_a_best_rate_at_an_end_is_tried_beyond(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    most: int,
    rates: dict[str, float],
    num_trials: int,
) -> None:
    """By the factor at that end; a second run or a listing knows what was added."""
    monkeypatch.chdir(tmp_path)
    tune = f"tune = {{learning_rate = [1e-5, 1e-4]}}\ntrial_extensions = {most}"
    words = [write(tmp_path, tune), "--device", "cpu", "-o", "mine.jsonl"]
    worker = "harness.workers.fake_scores"
    for _ in range(2):
        assert cli.main(["run", *words], worker_module=worker) == 0
        cells = [record.cell for record in runs.read(Path("mine.jsonl"))]
        results = [cell for cell in cells if cell.scored_on == "evaluation"]
        assert len(cells) - len(results) == num_trials
        assert {(c.method, c.learning_rate) for c in results} == {*rates.items()}
    capsys.readouterr()
    assert cli.main(["list", *words]) == 0
    every = num_trials + 4
    assert f"{every} cells, {every} done" in capsys.readouterr().out


def test_a_best_rate_at_the_lower_end_is_tried_below(
    here: Environment, tmp_path: Path
) -> None:
    path = write(tmp_path, f"{TUNE}\ntrial_extensions = 1")
    (tuning, _) = sweep.load(path, device="cpu").tunings
    records = {
        trial: record_of(here, trial, -trial.learning_rate) for trial in tuning.trials
    }

    def done(cells: Sequence[Cell]) -> dict[Cell, Record]:
        return {cell: records[cell] for cell in cells if cell in records}

    (found,) = trials.grown([tuning], done)
    assert [trial.learning_rate for trial in found.trials] == [*RATES, 1e-5]
    assert found.trials[-1].scored_on == "validation"
    # Where a trial is missing, which value is best is not known.
    del records[tuning.trials[-1]]
    assert trials.grown([tuning], done) == (tuning,)


def test_a_failed_trial_has_ended(here: Environment, tmp_path: Path) -> None:
    """Its value does not count; the best of the others may be at an end."""
    path = write(tmp_path, f"{TUNE}\ntrial_extensions = 1")
    (tuning, _) = sweep.load(path, device="cpu").tunings
    records = {
        trial: record_of(here, trial, score)
        for trial, score in zip(tuning.trials, (0.3, None, 0.4), strict=True)
    }

    def ended(cells: Sequence[Cell]) -> dict[Cell, Record]:
        return {cell: records[cell] for cell in cells if cell in records}

    (found,) = trials.grown([tuning], ended)
    assert [trial.learning_rate for trial in found.trials] == [*RATES, 1e-1]


@pytest.mark.parametrize(
    ("rates", "further"),
    [
        ((1e-3, 1.01e-3), 1.0201e-3),  # two digits would be a value that was tried
        ((1e-3, 1e-3 * (1 + 1e-9)), None),
    ],
)
def test_rates_that_are_almost_equal(
    here: Environment,
    tmp_path: Path,
    rates: tuple[float, float],
    further: float | None,
) -> None:
    tune = f"tune = {{learning_rate = {[*rates]}}}\ntrial_extensions = 1"
    (tuning, _) = sweep.load(write(tmp_path, tune), device="cpu").tunings
    records = {
        trial: record_of(here, trial, trial.learning_rate) for trial in tuning.trials
    }

    def ended(cells: Sequence[Cell]) -> dict[Cell, Record]:
        return {cell: records[cell] for cell in cells if cell in records}

    (found,) = trials.grown([tuning], ended)
    added = [trial.learning_rate for trial in found.trials[2:]]
    assert added == ([] if further is None else [further])


def test_methods_have_equally_many_extensions(tmp_path: Path) -> None:
    other = SWEEP.format(tune=f"{TUNE}\ntrial_extensions = 1")
    other = other.partition("\n[[matrix]]")[2].replace('"all"', '"other"')
    other = other.replace("[0, 1]", "[2, 3]")
    with pytest.raises(SweepError, match="matrices with 0 and 1 `trial_extensions`"):
        sweep.load(write(tmp_path, more=f"[[matrix]]{other}"), device="cpu")


def test_without_a_score_no_cell_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate is never guessed."""
    monkeypatch.chdir(tmp_path)
    words = [write(tmp_path), "--device", "cpu", "-o", "mine.jsonl"]
    code = cli.main(["run", *words], worker_module="harness.workers.fake_raises")
    assert code == harness.EXIT_FAILED
    assert {r.cell.scored_on for r in runs.read(Path("mine.jsonl"))} == {"validation"}
    error = capsys.readouterr().err
    assert "not run, 2 cells, such as head/" in error
    assert "none of their 3 trials has a score" in error


@pytest.mark.slow
def test_a_trial_is_scored_on_rows_set_aside() -> None:
    """A tenth of the training rows, and none of the evaluation."""
    fields: dict[str, Any] = {"backbone": "minilm-l6", "task": "bbc-news"}
    fields |= {"train_rows": 40, "batch_size": 4, "seq_len": 8, "max_steps": 3}
    cell = Cell(method="head", **fields)
    result: Any = run(replace(cell, scored_on="validation"), ChildOptions())
    if result["status"] == "skipped":
        pytest.skip(str(result["message"]))
    assert result["measurement"]["num_eval_rows"] == 4
    assert result["environment"]["data_origin"].endswith("scored on the rows set aside")
    too_few = replace(cell, scored_on="validation", train_rows=5)
    refused: Any = run(too_few, ChildOptions())
    assert "sets no rows aside" in refused["message"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            '[[matrix.set]]\nwhen = {method = "lora"}\nlearning_rate = 7e-3\n',
            "`learning_rate` is given twice",
        ),
    ],
)
def test_a_rule_does_not_set_what_is_tried(
    tmp_path: Path, more: str, words: str
) -> None:
    """It would have no effect."""
    with pytest.raises(SweepError, match=words):
        sweep.load(write(tmp_path, more=more), device="cpu")


def test_two_matrices_do_not_try_for_the_same_cells(tmp_path: Path) -> None:
    """Of which a method would have two results, and more trials than others."""
    other = SWEEP.format(tune="tune = {learning_rate = [3e-4, 3e-3, 3e-2]}")
    other = other.partition("\n[[matrix]]")[2].replace('"all"', '"other"')
    with pytest.raises(SweepError, match="two matrices have trials for the same cells"):
        sweep.load(write(tmp_path, more=f"[[matrix]]{other}"), device="cpu")


def test_a_trial_that_diverged_is_not_the_best(
    here: Environment, tmp_path: Path
) -> None:
    """Also where its score is not below that of others."""
    (tuning, _) = sweep.load(write(tmp_path), device="cpu").tunings
    seen = Measurement(score=0.5, loss_curve=[0.7, None]), Measurement(score=0.5)
    records = {
        trial: Record(
            sweep="s",
            cell=trial,
            status=Status.OK,
            message="",
            started_at="2026-01-01T00:00:00+00:00",
            wall_seconds=1.0,
            measurement=measurement,
            environment=here,
        )
        for trial, measurement in zip(tuning.trials, seen, strict=False)
    }
    assert trials.best_of(tuning, records) == tuning.trials[1]
