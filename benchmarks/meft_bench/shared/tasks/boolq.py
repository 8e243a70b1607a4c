"""BoolQ: questions with yes or no as the answer, about a passage
(Clark et al., NAACL 2019).

Where there is only the development file, a fifth of its passages are scored and the
others train, so that no passage is in both.
"""

from meft_bench.shared.tasks.facts import (
    OFFICIAL_DEV,
    OPTIONS,
    DataFiles,
    Facts,
    Hub,
    Splits,
)

FACTS = Facts(
    name="boolq",
    title="BoolQ",
    asks="whether the answer to a question about a passage is yes",
    kind=OPTIONS,
    fields=("passage", "question"),
    prompt="{passage}\nQuestion: {question}?\nAnswer:",
    metric="options",
    protocol="acc of lm-evaluation-harness, whose version of the task has no acc_norm",
    licence="CC BY-SA 3.0",
    ways=(
        DataFiles(
            folder="boolq",
            names=("train.jsonl", "dev.jsonl"),
            read="options:boolq",
            splits=OFFICIAL_DEV,
        ),
        DataFiles(
            folder="boolq",
            names=("dev.jsonl",),
            read="options:boolq_dev",
            splits=Splits(
                train="official dev rows of four passages in five, not train rows",
                evaluation="official dev rows of the other passages",
            ),
        ),
        Hub(name="google/boolq", read="options:boolq_row", splits=OFFICIAL_DEV),
    ),
)
