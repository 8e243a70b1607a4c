"""Rows with options are scored as by lm-evaluation-harness.

What it computes is in `fixtures/lm-evaluation-harness.json`, which
`fixtures/make_options.py` has written; the file names the versions.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from harness import options_model
from harness.tiny import cell, task_of
from meft_bench.child.scoring import answers
from meft_bench.child.scoring.rules import METRICS, Choice
from meft_bench.child.tasks.formats import options
from meft_bench.child.tasks.question import Question
from meft_bench.child.tasks.questions import question_of
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.registry import TASKS, load
from meft_bench.shared.source import Source
from meft_bench.shared.tasks import TABLE

THEIRS = json.loads(
    Path(__file__)
    .with_name("fixtures")
    .joinpath("lm-evaluation-harness.json")
    .read_text()
)
READERS = {
    "arc-easy": options.arc_row,
    "arc-challenge": options.arc_row,
    "openbookqa": options.openbookqa_row,
    "piqa": options.piqa_row,
    "boolq": options.boolq_row,
    "sciq": options.sciq_row,
}


def requests_of(question: Question) -> list[list[str]]:
    """Prompt and continuation for every option."""
    return [[question.prompt, f" {option}"] for option in question.options]


def agree(task: str, questions: list[Question], theirs: list[dict[str, Any]]) -> None:
    """Log-likelihoods and both accuracies are the same, row by row."""
    stepper, tokenizer = (
        Stepper(options_model.model(), cell()),
        options_model.tokenizer(),
    )
    here = cell(seq_len=8000, batch_size=7)
    stepper.model.eval()
    mine = answers.log_likelihoods(stepper, questions, tokenizer, here)
    made = task_of(TABLE[task].metric, *questions)
    chosen = answers.predict(stepper, made, questions, tokenizer, here)
    rules = METRICS[TABLE[task].metric].values
    for question, found, choice, its in zip(
        questions, mine, chosen, theirs, strict=True
    ):
        assert found == pytest.approx(its["log_likelihoods"], rel=1e-4)
        assert rules["accuracy"](choice, question) == its["acc"]
        if its["acc_norm"] is not None:
            assert rules["accuracy_per_character"](choice, question) == its["acc_norm"]


@pytest.mark.parametrize("task", READERS)
def test_rows_are_scored_as_by_lm_evaluation_harness(task: str) -> None:
    """Prompts and options, character by character; likelihoods; both accuracies.

    Among the rows are options in another script, of other numbers and with other
    letters, two that are equal, and a question that ends in a space.
    """
    rows = options_model.ROWS[task]
    questions = [question_of(TABLE[task], READERS[task](row)) for row in rows]
    theirs = THEIRS["made_up"][task]
    for question, its in zip(questions, theirs, strict=True):
        assert requests_of(question) == its["requests"]
    agree(task, questions, theirs)


@pytest.mark.parametrize("task", THEIRS["real"])
def test_real_rows_are_scored_as_by_lm_evaluation_harness(
    task: str, data_dir: Path
) -> None:
    """The first of the rows that a cell scores."""
    theirs = THEIRS["real"][task]
    chosen = cell(task=task, eval_rows=len(theirs))
    found = load(TASKS[task])(chosen, Source(data_dir=data_dir)).evaluation
    for question, its in zip(found, theirs, strict=True):
        text = json.dumps(requests_of(question))
        assert hashlib.sha256(text.encode()).hexdigest() == its["requests"]
    agree(task, list(found), theirs)


def question(**changes: Any) -> Question:
    fields: dict[str, Any] = {
        "prompt": "Question: which?\nAnswer:",
        "answer": " ab",
        "accepted": ("ab",),
        "options": ("abcd", "ab"),
    }
    return Question(**fields | changes)


def test_the_two_rules_choose_by_the_sum_and_by_the_mean() -> None:
    """The long option is likelier per character, the short one as a whole."""
    chosen = answers.choice_of(question(), [-6.0, -4.0])
    assert chosen == Choice(likeliest=1, likeliest_per_character=0)
    task = task_of("options_per_character", question())
    assert answers.scores(task, [chosen], task.evaluation) == {
        "accuracy_per_character": 0.0,
        "accuracy": 1.0,
    }
    assert answers.is_right(task, [chosen], task.evaluation) == [False]
    plain = task_of("options", question())
    assert answers.is_right(plain, [chosen], plain.evaluation) == [True]


def test_characters_count_and_not_bytes() -> None:
    """Two characters of two bytes are as long as two of one."""
    asked = question(options=("éé", "abc"), accepted=("éé",))
    assert answers.choice_of(asked, [-2.0, -3.1]).likeliest_per_character == 0


def test_of_options_that_are_equally_likely_the_first_is_chosen() -> None:
    """As numpy's `argmax` has it."""
    assert answers.choice_of(question(options=("x", "ab")), [-1.0, -1.0]) == Choice(
        0, 1
    )
    assert answers.choice_of(question(options=("ab", "cd")), [-1.0, -1.0]) == Choice(
        0, 0
    )


def test_an_empty_option_is_refused() -> None:
    """It has no characters to divide by, and no tokens."""
    with pytest.raises(ValueError, match="expected none that is empty"):
        question(options=("ab", ""))
