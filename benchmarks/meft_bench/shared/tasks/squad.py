"""SQuAD v1.1: questions about a paragraph, whose answers are parts of it
(Rajpurkar et al., EMNLP 2016).

XQuAD-en is a part of the development set. Where it is all there is, the questions of
four articles in five train and those of the fifth are scored; such a score is not
comparable with published ones. Scores are exact match and F1 of the official script,
and whether an accepted answer appears in the generated text.
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
    name="squad",
    title="SQuAD v1.1",
    asks="an answer to a question about a paragraph",
    kind=WORDS,
    fields=("context", "question"),
    prompt="{context}\nQuestion: {question}\nAnswer:",
    max_new_tokens=32,
    metric="squad",
    protocol="exact match and F1 of evaluate-v1.1.py",
    licence="CC BY-SA 4.0",
    ways=(
        DataFiles(
            folder="squad",
            names=("train-v1.1.json", "dev-v1.1.json"),
            read="words:squad",
            splits=OFFICIAL_DEV,
        ),
        DataFiles(
            folder="squad-xquad-en",
            names=("xquad.en.json",),
            read="words:xquad",
            splits=Splits(
                train="rows of four articles in five of XQuAD-en, a part of dev",
                evaluation="rows of its other articles",
            ),
        ),
        Hub(name="rajpurkar/squad", read="words:squad_row", splits=OFFICIAL_DEV),
    ),
)
