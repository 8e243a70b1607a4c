"""QQP: whether two questions on Quora ask the same (Iyer et al., 2017).

A few lines of the official files have too few columns; they are left out, as by the
loader of the hub.
"""

from meft_bench.shared.tasks.facts import (
    LABELS,
    OFFICIAL_DEV,
    PARTS_OF_TRAIN,
    DataFiles,
    Facts,
    Hub,
)

FACTS = Facts(
    name="qqp",
    title="GLUE QQP",
    asks="whether two questions ask the same",
    kind=LABELS,
    fields=("question1", "question2"),
    labels=("0", "1"),
    metric="accuracy_and_f1",
    protocol="accuracy, and F1 of label 1, over all rows",
    licence="Quora's terms: non-commercial research",
    ways=(
        DataFiles(
            folder="glue/QQP",
            names=("train.tsv", "dev.tsv"),
            read="glue:tables",
            splits=OFFICIAL_DEV,
            renamed=(("is_duplicate", "label"),),
            has_broken_lines=True,
        ),
        DataFiles(
            folder="glue/QQP",
            names=("train_subset_9k.json", "train_subset_1k_heldout.json"),
            read="glue:subsets",
            splits=PARTS_OF_TRAIN,
            renamed=(("text_a", "question1"), ("text_b", "question2")),
        ),
        Hub(
            name="nyu-mll/glue", config="qqp", read="glue:hub_row", splits=OFFICIAL_DEV
        ),
    ),
)
