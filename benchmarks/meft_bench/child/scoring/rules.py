"""The metrics of questions, with one rule for each value.

    options     `options`: the chosen option is the right one
    squad       `exact_match` and `f1` of SQuAD 1.1; `contains_any_case`: an accepted
                answer appears in the answer, ignoring case
    nq_open     `exact_match` and `f1` of NQ-open; `contains`: an accepted answer
                appears in the answer, with the same case
    trivia_qa   `exact_match` and `f1` of TriviaQA; `contains_any_case`
    gsm8k       `final_number`: the number after the first `#### ` is that of the
                solution

For all but `gsm8k`, the answer is the first line of the generated text. The first value
of each metric is the score; it is 1 or 0 for each row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from meft_bench.child.scoring import normalised
from meft_bench.child.tasks.gsm8k import final_number
from meft_bench.child.tasks.question import Question

ScoringRule = Callable[[str, Question], float]
"""Function from a text and a question to the text's value as an answer, from 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """The values of a metric, and a key that identifies equal answers."""

    values: dict[str, ScoringRule]
    """Rules by name; the first is the score."""
    key: Callable[[str], str]
    """Equal for two accepted answers if and only if the metric treats them as equal."""


def _options(text: str, question: Question) -> float:
    return float(text in question.accepted)


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
    "options": Metric(values={"options": _options}, key=str),
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
