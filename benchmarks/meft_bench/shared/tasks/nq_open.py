"""NQ-open: questions that people entered in a search engine, answered without a text
(Lee et al., ACL 2019).

`topics.nq.dev.txt`, the development set of DPR, is a part of the official training set;
it shares no question with the official development set. Scores are exact match and F1,
normalised as in the official evaluation, and whether an accepted answer appears in the
generated text (Hao et al., ACL 2024, and their code).
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
    name="nq-open",
    title="NQ-open",
    asks="an answer to a question of a search engine, without a text",
    kind=WORDS,
    fields=("question",),
    prompt="Question: {question}?\nAnswer:",
    max_new_tokens=32,
    metric="nq_open",
    protocol="exact match, normalised as in ORQA's eval_utils.py",
    licence="CC BY-SA 3.0",
    ways=(
        DataFiles(
            folder="nq-open",
            names=("NQ-open.train.jsonl", "NQ-open.dev.jsonl"),
            read="words:nq_open",
            splits=OFFICIAL_DEV,
        ),
        DataFiles(
            folder="nq-open",
            names=("topics.nq.dev.txt", "NQ-open.dev.jsonl"),
            read="words:nq_open_topics",
            splits=Splits(
                train="official train rows, a part of all",
                evaluation="official dev rows",
            ),
        ),
        Hub(
            name="google-research-datasets/nq_open",
            config="nq_open",
            read="words:nq_open_row",
            splits=OFFICIAL_DEV,
        ),
    ),
)
