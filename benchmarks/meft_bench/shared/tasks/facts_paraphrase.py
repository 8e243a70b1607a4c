"""Biographies: five facts about each of some made-up people, asked in other words.

Each attribute of a person is asked for in three wordings in training, and in a fourth
one, which no person was asked in, for the score (after Allen-Zhu and Li, ICML 2024). A
model that has learned the questions by heart and not the facts fails.
"""

from meft_bench.shared.tasks.facts import WORDS, Facts, FromSeed, Splits

FACTS = Facts(
    name="facts-paraphrase",
    title="biographies of made-up people",
    asks="an attribute of a made-up person, in words that training does not have",
    kind=WORDS,
    fields=("question",),
    prompt="Question: {question}\nAnswer:",
    max_new_tokens=12,
    metric="nq_open",
    protocol="exact match, normalised as NQ-open's",
    licence="none, as they are made up",
    ways=(
        FromSeed(
            read="facts:biographies",
            splits=Splits(
                train="questions about made-up people, three wordings of each",
                evaluation="questions about the same people, in a fourth wording",
            ),
        ),
    ),
)
