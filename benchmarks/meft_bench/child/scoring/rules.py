"""The metrics of questions, with one rule for each value.

    options_per_character
                `accuracy_per_character`: the option with the largest log-likelihood per
                character is the right one (`acc_norm` of lm-evaluation-harness);
                `accuracy`: the most likely option is (its `acc`)
    options     `accuracy`, `accuracy_per_character`: the same, another score
    squad       `exact_match` and `f1` of SQuAD 1.1; `contains_any_case`: an accepted
                answer appears in the answer, ignoring case
    nq_open     `exact_match` and `f1` of NQ-open; `contains`: an accepted answer
                appears in the answer, with the same case
    trivia_qa   `exact_match` and `f1` of TriviaQA; `contains_any_case`
    gsm8k       `final_number`: the number after the first `#### ` is that of the
                solution

For short answers, which are all but those of `gsm8k`, the answer is the first line of
the generated text. The first value of each metric is the score; it is 1 or 0 for each
row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from meft_bench.child.scoring import normalised
from meft_bench.child.tasks.gsm8k import final_number
from meft_bench.child.tasks.question import Question


@dataclass(frozen=True, slots=True)
class Choice:
    """The options of a question that a model chooses, by two rules; indices."""

    likeliest: int
    """The option with the largest log-likelihood."""
    likeliest_per_character: int
    """The one with the largest log-likelihood divided by its number of characters."""


Answer = Choice | str
"""A choice among options, or a generated text."""
ScoringRule = Callable[[Any, Question], float]
"""Function from an answer and a question to the value of the answer, from 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """The values of a metric, and a key that identifies equal answers."""

    values: dict[str, ScoringRule]
    """Rules by name; the first is the score."""
    key: Callable[[str], str]
    """Equal for two accepted answers if and only if the metric treats them as equal."""


def _likeliest(choice: Choice, question: Question) -> float:
    return float(choice.likeliest == question.right_option)


def _likeliest_per_character(choice: Choice, question: Question) -> float:
    return float(choice.likeliest_per_character == question.right_option)


def _contains(text: str, question: Question) -> float:
    line = first_line(text)
    return float(any(answer in line for answer in question.accepted))


def _contains_any_case(text: str, question: Question) -> float:
    line = first_line(text).lower()
    return float(any(answer.lower() in line for answer in question.accepted))


def _final_number(text: str, question: Question) -> float:
    wanted = final_number(question.accepted[0])
    return float(wanted is not None and final_number(text) == wanted)


def first_line(text: str) -> str:
    """Return the first line that is not blank, without surrounding spaces."""
    return text.strip().partition("\n")[0].strip()


def _exact_match(
    text: str, question: Question, normalise: normalised.Normalise
) -> float:
    return normalised.exact_match(first_line(text), question.accepted, normalise)


def _f1(text: str, question: Question, normalise: normalised.Normalise) -> float:
    return normalised.f1(first_line(text), question.accepted, normalise)


def _in_words(
    normalise: normalised.Normalise, contains: str, rule: ScoringRule
) -> Metric:
    """Return the metric of a data set whose answers are a few words.

    Args:
        normalise: the normalisation of the data set's official evaluation.
        contains: name of the rule for an answer that appears in the text.
        rule: that rule.
    """
    return Metric(
        values={
            "exact_match": partial(_exact_match, normalise=normalise),
            "f1": partial(_f1, normalise=normalise),
            contains: rule,
        },
        key=normalise,
    )


METRICS = {
    "options_per_character": Metric(
        values={
            "accuracy_per_character": _likeliest_per_character,
            "accuracy": _likeliest,
        },
        key=str,
    ),
    "options": Metric(
        values={
            "accuracy": _likeliest,
            "accuracy_per_character": _likeliest_per_character,
        },
        key=str,
    ),
    "squad": _in_words(normalised.squad, "contains_any_case", _contains_any_case),
    "nq_open": _in_words(normalised.nq_open, "contains", _contains),
    "trivia_qa": _in_words(
        normalised.trivia_qa, "contains_any_case", _contains_any_case
    ),
    "gsm8k": Metric(
        values={"final_number": _final_number},
        key=lambda answer: final_number(answer) or "",
    ),
}
"""The metrics by name, as tasks refer to them."""
