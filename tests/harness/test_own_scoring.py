"""Scores of a user's tasks: numbers, tokens, and metrics of their own."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from harness.own_files import SHAPE, tokenizer
from harness.tiny import cell, task_of
from meft_bench.child.own import metric as own_metric
from meft_bench.child.scoring import answers, labels, numbers, tokens
from meft_bench.child.tasks.batches import Example
from meft_bench.child.tasks.question import Question
from meft_bench.child.tasks.task import Row, Task
from meft_bench.child.training.steps import Stepper


def task(metric: str, *rows: Row, num_labels: int | None = 2) -> Task:
    return Task(
        name="made up",
        num_labels=num_labels,
        train=rows,
        validation=(),
        evaluation=rows,
        metric=metric,
        origin="made up",
    )


def examples(*values: float) -> list[Example]:
    return [Example(token_ids=[1], segment_ids=[0], label=v) for v in values]


def test_numbers_are_scored_by_both_correlations() -> None:
    """As scipy computes them; a constant answer has none, and the mean is constant."""
    wanted, found = [1.0, 2.0, 4.0, 3.5], [0.5, 1.0, 9.0, 2.0]
    rows = tuple(Row(("a",), value) for value in wanted)
    its = task("pearson_and_spearman", *rows, num_labels=1)
    assert numbers.scores(its, found, examples(*wanted)) == {
        "pearson": float(stats.pearsonr(found, wanted)[0]),
        "spearman": float(stats.spearmanr(found, wanted)[0]),
    }
    for constant in (
        numbers.scores(its, [2.0] * 4, examples(*wanted)),
        numbers.majority(its),
    ):
        assert {*constant} == {"pearson", "spearman"}
        assert all(map(math.isnan, constant.values()))


@pytest.fixture
def stepper() -> Stepper:
    torch.manual_seed(0)
    return Stepper(LlamaForCausalLM(LlamaConfig(**SHAPE)), cell())


def test_tokens_are_scored_by_their_likelihood(stepper: Stepper) -> None:
    """The mean over all tokens of all texts, each row alone and without padding."""
    texts = ["a film", "the very very good film was bad", "bad"]
    rows = tuple(Row((text,), 0) for text in texts)
    its = task("log_likelihood_per_token", *rows, num_labels=None)
    words = tokenizer()
    encoded = tokens.examples(its, words, cell()).evaluation
    assert [len(row.token_ids) for row in encoded] == [3, 8, 2]
    predicted = tokens.predict(stepper, its, encoded, words, cell(batch_size=2))
    likelihoods = []
    for text in texts:
        ids = torch.tensor([[*words(text)["input_ids"], words.eos_token_id]])
        with torch.no_grad():
            logits = stepper.model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        likelihoods += logits.gather(1, ids[0, 1:, None]).flatten().tolist()
    wanted = sum(likelihoods) / len(likelihoods)
    scores = tokens.scores(its, predicted, encoded)
    assert scores["log_likelihood_per_token"] == pytest.approx(wanted, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(-wanted), rel=1e-5)
    assert all(map(math.isnan, tokens.majority(its).values()))
    assert {*tokens.majority(its)} == {*scores}


def test_no_token_of_a_long_text_is_lost() -> None:
    """It becomes several rows; a row of one token has nothing to predict."""
    text = " ".join(["film", "good", "bad"] * 3)
    its = task("log_likelihood_per_token", Row((text,), 0), num_labels=None)
    rows = tokens.examples(its, tokenizer(), cell(seq_len=4)).train
    ids = [token for row in rows for token in row.token_ids]  # type: ignore[union-attr]
    assert ids == [*tokenizer()(text)["input_ids"], tokenizer().eos_token_id]
    assert [len(row.token_ids) for row in rows] == [4, 4, 2]  # type: ignore[union-attr]
    nine = tokens.examples(its, tokenizer(), cell(seq_len=3)).train
    assert [len(row.token_ids) for row in nine] == [3, 3, 3]  # type: ignore[union-attr]


def test_a_hopeless_model_has_a_finite_perplexity() -> None:
    its = task("log_likelihood_per_token", Row(("a",), 0), num_labels=None)
    assert math.isfinite(tokens.scores(its, [(1e4, 1)], [])["perplexity"])


MINE = """
import evaluate
from datasets import Features, Value

def exact(predictions, references):
    return sum(p == r for p, r in zip(predictions, references)) / len(references)

def two(predictions, references):
    return {"mine": 0.5, "other": -2}

def seen(predictions, references):
    return {f"{predictions} {references}": 1}

def four(predictions, references):
    return dict.fromkeys("abcd", 1.0)

def text(predictions, references):
    return "good"

def infinite(predictions, references):
    return float("inf")

def fails(predictions, references):
    raise KeyError("no such answer")

class Mine(evaluate.Metric):
    def _info(self):
        number = Value("int64")
        features = Features({"predictions": number, "references": number})
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions, references):
        return {"mine": float(sum(predictions)), "true": float(sum(references))}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_a_function_scores_labels(mine: Path) -> None:
    """Under its own name, with the beginning that says whose it is."""
    its = task(f"python:{mine}:exact", Row(("a",), 0), Row(("b",), 1), Row(("c",), 1))
    rows = examples(0, 1, 1)
    assert labels.scores(its, [0, 1, 0], rows) == {"own:exact": 2 / 3}
    assert labels.majority(its) == {"own:exact": 2 / 3}
    assert labels.is_right(its, [0, 1, 0], rows) == [True, True, False]


def test_a_function_scores_numbers(mine: Path) -> None:
    its = task(f"python:{mine}:two", Row(("a",), 0.5), num_labels=1)
    found = numbers.scores(its, [0.1], examples(0.5))
    assert found == {"own:mine": 0.5, "own:other": -2.0}


def test_a_metric_of_evaluate_scores_labels(mine: Path) -> None:
    """Without the hub, and without a cache that cells would share."""
    its = task(f"evaluate:{mine}", Row(("a",), 1), Row(("b",), 0))
    found = labels.scores(its, [1, 1], examples(1, 0))
    assert found == {"own:mine": 2.0, "own:true": 1.0}


@pytest.mark.parametrize("several", [False, True])
def test_a_function_scores_answers(mine: Path, several: bool) -> None:
    """It gets texts, and lists of texts where a row accepts several."""
    accepted = ("red", "crimson") if several else ("red",)
    question = Question(prompt="q", answer=" red", accepted=accepted)
    its = task_of(f"python:{mine}:seen", question)
    (name,) = answers.scores(its, ["blue"], [question])
    wanted = "[['red', 'crimson']]" if several else "['red']"
    assert name == f"own:['blue'] {wanted}"
    assert answers.is_right(its, ["blue"], [question]) is None
    (common,) = answers.majority(its)
    assert "red" in common


def test_a_function_scores_options(mine: Path) -> None:
    """The majority answer is still the most frequent position."""
    rows = [
        Question(prompt="q", answer=f" {a}", accepted=(a,), options=("x", "y"))
        for a in "xyy"
    ]
    its = task_of(f"python:{mine}:exact", *rows, max_new_tokens=0)
    assert answers.scores(its, ["x", "x", "y"], rows) == {"own:exact": 2 / 3}
    assert answers.majority(its) == {"own:exact": 2 / 3}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("four", "returned 4 values, and a record has 1 to 3"),
        ("text", "returned 'good' as 'text', expected a finite number"),
        ("infinite", "returned inf as 'infinite', expected a finite number"),
        ("fails", "failed: KeyError: 'no such answer'"),
        ("exat", r"has no 'exat'; did you mean 'exact'\?"),
    ],
)
def test_a_metric_that_is_none_is_an_error(mine: Path, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        own_metric.scores(f"python:{mine}:{name}", [1], [1])


def test_a_module_with_several_metrics_is_refused(mine: Path) -> None:
    mine.write_text(MINE + "\nclass Other(Mine):\n    pass\n")
    with pytest.raises(ValueError, match=r"defines 2 classes of `evaluate.Metric`"):
        own_metric.scores(f"evaluate:{mine}", [1], [1])


def test_generated_text_ends_where_its_task_says(
    stepper: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Question:` ends answers of the suite's tasks, and not those of a user."""
    words = tokenizer()
    said = words("red Question: blue", return_tensors="pt")["input_ids"]
    stops = []

    def generate(input_ids: torch.Tensor, **given: Any) -> torch.Tensor:
        stops.append(given["stop_strings"])
        return torch.cat([input_ids, said], dim=1)

    monkeypatch.setattr(stepper.model, "generate", generate)
    question = Question(prompt="a film", answer=" red", accepted=("red",))
    written: list[Any] = []
    for stop in ("Question", ""):
        its = task_of("squad", question, stop=stop, max_new_tokens=6)
        written += answers.predict(stepper, its, [question], words, cell())
    assert written == ["red ", "red Question : blue"]
    assert stops == [["Question"], None]
