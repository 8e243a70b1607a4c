"""Classifiers: labels that are predicted, and the scores of them."""

import pytest
import torch
from transformers import BertTokenizer

from harness.tiny import cell, classifier
from meft_bench.child.scoring import labels
from meft_bench.child.tasks.batches import Example
from meft_bench.child.tasks.task import Row, Task
from meft_bench.child.training.steps import Stepper


def rows(*found: int) -> tuple[Row, ...]:
    """A row per label, each with another text."""
    return tuple(
        Row(("ab"[: 1 + label] * (1 + i),), label) for i, label in enumerate(found)
    )


def task(metric: str = "accuracy") -> Task:
    return Task(
        name="made up",
        num_labels=2,
        train=rows(1, 1, 0),
        validation=rows(0),
        evaluation=rows(0, 1, 1, 1),
        metric=metric,
        origin="made up",
    )


@pytest.fixture
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##a", "##b"]
    file = tmp_path_factory.mktemp("words") / "vocab.txt"
    file.write_text("\n".join(words))
    return BertTokenizer(str(file))


def test_every_split_becomes_tokens(tokenizer: BertTokenizer) -> None:
    """Of at most `seq_len`; each keeps its labels."""
    found = labels.examples(task(), tokenizer, cell(seq_len=3))
    for split, wanted in (
        (found.train, [1, 1, 0]),
        (found.validation, [0]),
        (found.evaluation, [0, 1, 1, 1]),
    ):
        assert [row.label for row in split] == wanted
        for row in split:
            assert isinstance(row, Example)
            assert len(row.token_ids) <= 3


def test_a_label_is_the_one_with_the_largest_logit(tokenizer: BertTokenizer) -> None:
    stepper = Stepper(classifier(), cell())
    found = labels.examples(task(), tokenizer, cell(seq_len=8)).evaluation
    predicted = labels.predict(stepper, task(), found, tokenizer, cell(batch_size=3))
    stepper.model.eval()
    for row, label in zip(found, predicted, strict=True):
        assert isinstance(row, Example)
        logits = stepper.model(torch.tensor([row.token_ids])).logits[0]
        assert label == int(logits.argmax())


def test_labels_are_held_against_the_true_ones(tokenizer: BertTokenizer) -> None:
    found = labels.examples(task(), tokenizer, cell(seq_len=8)).evaluation
    assert labels.is_right(task(), [0, 0, 1, 1], found) == [True, False, True, True]
    assert labels.scores(task(), [0, 0, 1, 1], found) == {"accuracy": 0.75}
    two = labels.scores(task("accuracy_and_f1"), [0, 0, 1, 1], found)
    assert list(two) == ["accuracy", "f1"]
    assert two["f1"] == pytest.approx(0.8)
    with pytest.raises(ValueError, match="zip"):
        labels.is_right(task(), [0], found)


def test_the_most_frequent_label_is_that_of_the_training_rows() -> None:
    """Scored on the evaluation rows, of which three in four have it."""
    assert labels.majority(task()) == {"accuracy": 0.75}
    assert labels.majority(task("matthews_correlation")) == {
        "matthews_correlation": 0.0
    }
