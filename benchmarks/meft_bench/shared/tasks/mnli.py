"""MNLI: whether one text follows from another, contradicts it, or neither
(Williams et al., NAACL 2018).

The score is that of the matched development rows, whose genres are those of the
training rows; the mismatched ones, of other genres, give a second value.
"""

from meft_bench.shared.tasks.facts import (
    LABELS,
    OFFICIAL_MATCHED_DEV,
    PARTS_OF_TRAIN,
    DataFiles,
    Facts,
    Hub,
)

FACTS = Facts(
    name="mnli",
    title="GLUE MNLI",
    asks="whether a hypothesis follows from a premise, contradicts it, or neither",
    kind=LABELS,
    fields=("premise", "hypothesis"),
    labels=("entailment", "neutral", "contradiction"),
    metric="accuracy",
    protocol="accuracy over the matched and, as a second value, the mismatched rows",
    licence="OANC licence, CC BY-SA 3.0 and CC BY 3.0 for fiction",
    ways=(
        DataFiles(
            folder="glue/MNLI",
            names=("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"),
            read="glue:tables",
            splits=OFFICIAL_MATCHED_DEV,
            renamed=(
                ("sentence1", "premise"),
                ("sentence2", "hypothesis"),
                ("gold_label", "label"),
            ),
        ),
        DataFiles(
            folder="glue/MNLI",
            names=("train_subset_9k.json", "train_subset_1k_heldout.json"),
            read="glue:subsets",
            splits=PARTS_OF_TRAIN,
            renamed=(("text_a", "premise"), ("text_b", "hypothesis")),
        ),
        Hub(
            name="nyu-mll/glue",
            config="mnli",
            evaluation="validation_matched",
            mismatched="validation_mismatched",
            read="glue:hub_row",
            splits=OFFICIAL_MATCHED_DEV,
        ),
    ),
)
