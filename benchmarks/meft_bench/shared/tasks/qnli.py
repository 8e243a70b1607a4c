"""QNLI: whether a sentence contains the answer to a question (from SQuAD)."""

from meft_bench.shared.tasks.facts import (
    LABELS,
    OFFICIAL_DEV,
    DataFiles,
    Facts,
    Hub,
    Splits,
)

FACTS = Facts(
    name="qnli",
    title="GLUE QNLI",
    asks="whether a sentence contains the answer to a question",
    kind=LABELS,
    fields=("question", "sentence"),
    labels=("entailment", "not_entailment"),
    metric="accuracy",
    protocol="accuracy over all rows",
    licence="CC BY-SA 4.0",
    ways=(
        DataFiles(
            folder="glue/QNLI",
            names=("train.tsv", "dev.tsv"),
            read="glue:tables",
            splits=OFFICIAL_DEV,
        ),
        DataFiles(
            folder="glue/QNLI",
            names=("train_subset_9k.json", "train_subset_1k_heldout.json", "dev.tsv"),
            read="glue:subsets_and_dev",
            splits=Splits(
                train="official train rows, a random part of all",
                evaluation="official dev rows",
            ),
            renamed=(("text_a", "question"), ("text_b", "sentence")),
        ),
        Hub(
            name="nyu-mll/glue", config="qnli", read="glue:hub_row", splits=OFFICIAL_DEV
        ),
    ),
)
