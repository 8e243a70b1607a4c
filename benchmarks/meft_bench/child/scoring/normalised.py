"""Exact match and F1 of short answers, as the official scripts compute them.

    exact_match   1 if prediction and answer are equal after normalisation
    f1            harmonic mean of precision and recall over the normalised words

Both are the maximum over the accepted answers. The scripts normalise differently:

    squad      lower case; no ASCII punctuation; no articles; single spaces
               (SQuAD 1.1's evaluate-v1.1.py)
    nq_open    Unicode NFD, then as SQuAD (ORQA's eval_utils.py, of NQ-open's authors)
    trivia_qa  lower case; ASCII punctuation and curly quotes become spaces; no
               articles; single spaces (TriviaQA's triviaqa_evaluation.py)
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

Normalise = Callable[[str], str]

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = set(string.punctuation)
TRIVIA_QA_PUNCTUATION = PUNCTUATION | set("\u2018\u2019\u00b4")


def squad(text: str) -> str:
    """Normalise `The Saint-Lawrence River!` to `saintlawrence river`."""
    return _words("".join(c for c in text.lower() if c not in PUNCTUATION))


def nq_open(text: str) -> str:
    """Normalise as `squad` does, with composed and decomposed accents made equal."""
    return squad(unicodedata.normalize("NFD", text))


def trivia_qa(text: str) -> str:
    """Normalise `The Saint-Lawrence River!` to `saint lawrence river`."""
    lower = text.lower()
    return _words("".join(" " if c in TRIVIA_QA_PUNCTUATION else c for c in lower))


def exact_match(
    prediction: str, accepted: Sequence[str], normalise: Normalise
) -> float:
    """Return 1 if the prediction is one of the accepted answers, else 0.

    Args:
        prediction: the model's answer.
        accepted: the accepted answers.
        normalise: applied to both.
    """
    found = normalise(prediction)
    return float(any(found == normalise(answer) for answer in accepted))


def f1(prediction: str, accepted: Sequence[str], normalise: Normalise) -> float:
    """Return the best F1 of the prediction's words against those of an accepted answer.

    Args:
        prediction: the model's answer.
        accepted: the accepted answers.
        normalise: applied to both.
    """
    found = normalise(prediction).split()
    return max(_f1(found, normalise(answer).split()) for answer in accepted)


def _f1(found: list[str], wanted: list[str]) -> float:
    common = (Counter(found) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> str:
    return " ".join(ARTICLES.sub(" ", text).split())
