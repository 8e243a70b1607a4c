"""TriviaQA: trivia questions without a text; most answers have many accepted forms
(Joshi et al., ACL 2017).

`topics.dpr.trivia.dev.txt`, the development set of DPR, is a part of the official
training set; `topics.dpr.trivia.test.txt` is the official unfiltered development set.
"""

from meft_bench.shared.tasks.facts import (
    OFFICIAL_DEV,
    WORDS,
    DataFiles,
    Facts,
    Hub,
    Splits,
)

FACTS = Facts(
    name="triviaqa",
    title="TriviaQA",
    asks="an answer to a trivia question, without a text",
    kind=WORDS,
    fields=("question",),
    prompt="Question: {question}\nAnswer:",
    max_new_tokens=32,
    metric="trivia_qa",
    protocol="exact match and F1 of triviaqa_evaluation.py",
    licence="questions collected by the University of Washington, no formal licence",
    ways=(
        DataFiles(
            folder="triviaqa",
            names=("topics.dpr.trivia.dev.txt", "topics.dpr.trivia.test.txt"),
            read="words:topics",
            splits=Splits(
                train="official train rows, a part of all",
                evaluation="official dev rows",
            ),
        ),
        Hub(
            name="mandarjoshi/trivia_qa",
            config="unfiltered.nocontext",
            read="words:triviaqa_row",
            splits=OFFICIAL_DEV,
        ),
    ),
)
