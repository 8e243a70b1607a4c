"""Classifiers and regression: what is predicted, and the scores of it."""

import dataclasses
import math
from statistics import fmean

import pytest
import torch
from transformers import BertTokenizer

from harness.tiny import FAMILIES, batch, cell, classifier
from meft_bench.child.backbones.classifier import model_class
from meft_bench.child.scoring import labels, numbers
from meft_bench.child.tasks.batches import Example
from meft_bench.child.tasks.task import Row, Task
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.backbones import problem_type


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


# Regression


def regression() -> Task:
    train = tuple(Row(("a" * n,), 0.5 * n) for n in range(1, 5))
    return dataclasses.replace(
        task("pearson_and_spearman"),
        num_labels=1,
        train=train,
        evaluation=train[:3],
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_loss_of_a_regression_is_the_mean_squared_error(model_type: str) -> None:
    """Of one output, in every family, whatever computes the loss."""
    config = classifier(model_type).config
    config.num_labels, config.problem_type = 1, problem_type(1)
    stepper = Stepper(model_class(config, 1).from_config(config), cell())
    wanted = torch.tensor([0.5, 1.5, 4.0, 5.0])
    inputs = stepper.to_device(batch() | {"labels": wanted})
    out = stepper.model.eval()(**inputs)
    assert out.logits.shape == (4, 1)
    torch.testing.assert_close(out.loss, ((out.logits[:, 0] - wanted) ** 2).mean())


def test_a_number_is_the_output_of_the_head(tokenizer: BertTokenizer) -> None:
    """Row by row, whatever the order in which rows are batched."""
    config = classifier().config
    config.num_labels = 1
    stepper = Stepper(model_class(config, 1).from_config(config), cell())
    found = numbers.examples(regression(), tokenizer, cell(seq_len=8)).evaluation
    predicted = numbers.predict(
        stepper, regression(), found, tokenizer, cell(batch_size=2)
    )
    for row, number in zip(found, predicted, strict=True):
        logits = stepper.model(torch.tensor([row.token_ids])).logits
        assert number == pytest.approx(logits.item(), abs=1e-6)


def test_numbers_are_scored_and_are_neither_right_nor_wrong(
    tokenizer: BertTokenizer,
) -> None:
    """The mean of the training rows, as a constant, correlates with nothing."""
    found = numbers.examples(regression(), tokenizer, cell(seq_len=8)).evaluation
    assert [row.label for row in found] == [0.5, 1.0, 1.5]
    scored = numbers.scores(regression(), [1, 2, 3], found)
    assert scored == {"pearson": pytest.approx(1), "spearman": pytest.approx(1)}
    constant = [fmean(row.label for row in regression().train)] * 3
    for values in (
        numbers.majority(regression()),
        numbers.scores(regression(), constant, found),
    ):
        assert all(math.isnan(value) for value in values.values())
