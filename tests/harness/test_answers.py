"""The rules by which answers in words are scored, against those of the field."""

import math
from typing import Any

import pytest

from harness.tiny import task_of
from meft_bench.child.scoring import answers, normalised
from meft_bench.child.scoring.rules import METRICS, first_line
from meft_bench.child.tasks.gsm8k import final_number
from meft_bench.child.tasks.question import Question

Score = tuple[int, float]


def question(*accepted: str, **changes: Any) -> Question:
    fields: dict[str, Any] = {
        "prompt": "Question: which colour?\nAnswer:",
        "answer": f" {accepted[0]}",
        "accepted": accepted,
    }
    return Question(**fields | changes)


# Exact match and F1 that the official scripts gave for these, run once: SQuAD 1.1's
# evaluate-v1.1.py, ORQA's eval_utils.py (F1 by its normalisation), and
# triviaqa_evaluation.py.
OFFICIAL: list[tuple[str, list[str], list[Score]]] = [
    (
        "The Saint Lawrence River!",
        ["the Saint-Lawrence river"],
        [(0, 0.4), (0, 0.4), (1, 1.0)],
    ),
    (
        "the Saint Lawrence",
        ["the Saint Lawrence River"],
        [(0, 0.8), (0, 0.8), (0, 0.8)],
    ),
    ("1,200", ["1200"], [(1, 1.0), (1, 1.0), (0, 0)]),
    ("1 200", ["1,200"], [(0, 0), (0, 0), (1, 1.0)]),
    ("a an the", ["The"], [(1, 0), (1, 0), (1, 0)]),
    ("", ["The"], [(1, 0), (1, 0), (1, 0)]),
    ("", ["blue"], [(0, 0), (0, 0), (0, 0)]),
    ("!?", ["..."], [(1, 0), (1, 0), (1, 0)]),
    ("Beyonce\u0301", ["Beyonc\xe9"], [(0, 0), (1, 1.0), (0, 0)]),
    ("Beyonce", ["Beyonc\xe9"], [(0, 0), (0, 0), (0, 0)]),
    ("\xe0 la carte", ["la carte"], [(0, 0.8), (0, 0.8), (0, 0.8)]),
    ("Schindler\u2019s List", ["Schindler's List"], [(0, 0.5), (0, 0.5), (1, 1.0)]),
    ("Schindlers List", ["Schindler's List"], [(1, 1.0), (1, 1.0), (0, 0.4)]),
    ("Schindler s List", ["Schindler's List"], [(0, 0.4), (0, 0.4), (1, 1.0)]),
    ("new_york", ["New York"], [(0, 0), (0, 0), (1, 1.0)]),
    ("A.C. Milan", ["AC Milan"], [(1, 1.0), (1, 1.0), (0, 0.5)]),
    ("another theme", ["other them"], [(0, 0), (0, 0), (0, 0)]),
    ("blue blue", ["blue"], [(0, 0.666667), (0, 0.666667), (0, 0.666667)]),
    ("red blue", ["blue red"], [(0, 1.0), (0, 1.0), (0, 1.0)]),
    ("red", ["blue", "Red"], [(1, 1.0), (1, 1.0), (1, 1.0)]),
    ("deep blue sea", ["deep sea", "blue"], [(0, 0.8), (0, 0.8), (0, 0.8)]),
    ("\u0130stanbul", ["istanbul"], [(0, 0), (0, 0), (0, 0)]),
    ("Stra\xdfe", ["STRASSE"], [(0, 0), (0, 0), (0, 0)]),
    ("\u201cHello\u201d", ["Hello"], [(0, 0), (0, 0), (0, 0)]),
    ("$5", ["5"], [(1, 1.0), (1, 1.0), (1, 1.0)]),
    ("50%", ["50"], [(1, 1.0), (1, 1.0), (1, 1.0)]),
    ("blue\xa0whale", ["blue whale"], [(1, 1.0), (1, 1.0), (1, 1.0)]),
    ("the\tblue\u2003 whale ", ["blue whale"], [(1, 1.0), (1, 1.0), (1, 1.0)]),
    ("\u4e2d\u56fd", ["\u4e2d\u56fd"], [(1, 1.0), (1, 1.0), (1, 1.0)]),
]


@pytest.mark.parametrize(("prediction", "accepted", "wanted"), OFFICIAL)
def test_exact_match_and_f1_are_those_of_the_official_scripts(
    prediction: str, accepted: list[str], wanted: list[Score]
) -> None:
    """Punctuation, articles, accents, quotes, repeated words, empty answers."""
    for normalise, (match, f1) in zip(
        (normalised.squad, normalised.nq_open, normalised.trivia_qa),
        wanted,
        strict=True,
    ):
        assert normalised.exact_match(prediction, accepted, normalise) == match
        found = normalised.f1(prediction, accepted, normalise)
        assert math.isclose(found, f1, abs_tol=1e-6), normalise.__name__


@pytest.mark.parametrize(
    ("metric", "names"),
    [
        ("squad", ["exact_match", "f1", "contains_any_case"]),
        ("nq_open", ["exact_match", "f1", "contains"]),
        ("trivia_qa", ["exact_match", "f1", "contains_any_case"]),
        ("gsm8k", ["final_number"]),
        ("options", ["accuracy", "accuracy_per_character"]),
        ("options_per_character", ["accuracy_per_character", "accuracy"]),
    ],
)
def test_a_metric_says_the_score_first(metric: str, names: list[str]) -> None:
    assert list(METRICS[metric].values) == names


@pytest.mark.parametrize(
    ("metric", "text", "wanted"),
    [
        ("nq_open", " the Blue.\nred", (1, 1, 1)),
        ("nq_open", " It is Blue sky\nred", (0, 0.4, 1)),
        ("nq_open", "it is blue", (0, 0.5, 0)),
        ("nq_open", "red\nBlue", (0, 0, 0)),
        ("nq_open", "\n\n Blue", (1, 1, 1)),
        ("nq_open", "Blue\r\nred", (1, 1, 1)),
        ("squad", "it is blue", (0, 0.5, 1)),
        ("squad", "BLUE!", (1, 1, 1)),
        ("trivia_qa", "blue_sky", (0, 2 / 3, 1)),
        ("trivia_qa", "bluesky", (0, 0, 1)),
    ],
)
def test_a_short_answer_is_the_first_line_that_is_written(
    metric: str, text: str, wanted: tuple[float, ...]
) -> None:
    """Exact match and F1 of it, and whether `Blue` appears in it."""
    task = task_of(metric, question("Blue"))
    found = answers.scores(task, [text], task.evaluation)
    assert tuple(found.values()) == pytest.approx(wanted)
    assert answers.is_right(task, [text], task.evaluation) == [wanted[0] == 1]


def test_the_best_of_several_accepted_answers_counts() -> None:
    """Each value has its own best one."""
    asked_once = question("deep blue sea", "Red")
    task = task_of("squad", asked_once)
    assert answers.scores(task, ["deep sea"], [asked_once]) == {
        "exact_match": 0.0,
        "f1": pytest.approx(0.8),
        "contains_any_case": 0.0,
    }
    assert answers.scores(task, ["red"], [asked_once])["exact_match"] == 1.0


def test_scores_are_means_over_the_rows() -> None:
    task = task_of("nq_open", question("blue"), question("red"), question("big sky"))
    found = answers.scores(task, ["Blue", "blue", "sky"], task.evaluation)
    assert found == {
        "exact_match": pytest.approx(1 / 3),
        "f1": pytest.approx((1 + 0 + 2 / 3) / 3),
        "contains": 0.0,
    }


@pytest.mark.parametrize("accepted", [(), ("",), ("blue", " ")])
def test_a_question_without_an_answer_is_refused(accepted: tuple[str, ...]) -> None:
    """An empty one appears in every text, so that everything would be right."""
    with pytest.raises(ValueError, match="expected one or more, none of them empty"):
        Question(prompt="Question: which?\nAnswer:", answer=" blue", accepted=accepted)


# GSM8K


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("so 9+9=18\n#### 18", "18"),
        ("#### 18 dollars", "18"),
        ("#### 18%", "18"),
        ("#### 18\nThat is the answer to the question.", "18"),
        ("#### 18\n#### 19", "18"),
        ("#### 1,800", "1800"),
        ("#### -18", "-18"),
        ("#### 18.0", "18.0"),
        ("#### 18.", "18."),
        ("##### 18", "18"),
        ("18", None),
        ("The answer is 18.", None),
        ("####18", None),
        ("#### $18", None),
        ("#### eighteen", None),
        ("###  18", None),
        ("####  18", None),
        ("", None),
    ],
)
def test_the_final_number_is_the_one_that_the_official_rule_finds(
    text: str, wanted: str | None
) -> None:
    r"""The first match of `#### (\-?[0-9\.\,]+)`, its commas removed."""
    assert final_number(text) == wanted


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("#### 1200", True),
        ("#### 1,200 dollars", True),
        ("#### 1200.0", False),  # compared as text, as in the official script
        ("1200", False),
        ("#### 12", False),
    ],
)
def test_a_problem_is_solved_if_its_final_number_is_right(
    text: str, is_right: bool
) -> None:
    task = task_of("gsm8k", question("600*2=1200\n#### 1,200"))
    assert answers.is_right(task, [text], task.evaluation) == [is_right]
    assert answers.scores(task, [text], task.evaluation) == {"final_number": is_right}


# The score to compare with


def test_the_most_frequent_answer_is_the_one_that_the_metric_takes_as_one() -> None:
    """Five spellings of one answer are more than two of another."""
    spellings = ("The Blue", "blue!", "BLUE")
    learned = [question(text) for text in ("red", "red", *spellings)]
    task = task_of("squad", *learned, evaluation=(question("blue"), question("red")))
    assert answers.majority(task) == {
        "exact_match": 0.5,
        "f1": 0.5,
        "contains_any_case": 0.5,
    }


def test_the_most_frequent_number_is_what_gsm8k_is_compared_with() -> None:
    """All solutions differ, so the most frequent of them is right about nothing."""
    solutions = ("1+3=4\n#### 4", "2+2=4\n#### 4", "#### 5", "10-6=4\n#### 4")
    task = task_of("gsm8k", *map(question, solutions))
    assert answers.majority(task) == {"final_number": 0.75}


def test_the_most_frequent_place_is_what_options_are_compared_with() -> None:
    """Where a question has fewer options, it is the last of them."""
    long, short = ("a", "b", "c", "d"), ("b", "a")
    questions = [question("d", options=long)] * 2
    questions += [question("a", options=long), question("c", options=long)]
    questions += [question("a", options=short)]
    assert answers.majority(task_of("options", *questions)) == {
        "accuracy": 3 / 5,
        "accuracy_per_character": 3 / 5,
    }


def test_as_many_answers_as_questions_are_scored() -> None:
    task = task_of("squad", question("blue"), question("red"))
    for score in (answers.scores, answers.is_right):
        with pytest.raises(ValueError, match="zip"):
            score(task, ["blue"], task.evaluation)


@pytest.mark.parametrize(
    ("metric", "same", "other"),
    [
        ("squad", "Beyonc\u00e9", "Beyonce\u0301"),
        ("nq_open", "beyonce\u0301!", "Beyonce"),
        ("trivia_qa", "beyonc\u00e9", "b eyonc\u00e9"),
    ],
)
def test_each_metric_has_its_own_normalisation(
    metric: str, same: str, other: str
) -> None:
    """In exact match, in F1, and in what it takes as one answer."""
    task = task_of(metric, question("Beyonc\u00e9"))
    values = list(METRICS[metric].values.values())[:2]
    assert [rule(same, task.evaluation[0]) for rule in values] == [1, 1]
    assert [rule(other, task.evaluation[0]) for rule in values] == [0, 0]
    key = METRICS[metric].key
    assert key(same) == key("Beyonc\u00e9") != key(other)


def test_the_first_line_that_is_not_blank_is_read() -> None:
    assert first_line(" \n\t\n  deep sea \nred") == "deep sea"
    assert first_line("\n ") == ""
