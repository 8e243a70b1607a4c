"""PIQA: which of two solutions reaches a goal in the physical world
(Bisk et al., AAAI 2020).
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
    name="piqa",
    title="PIQA",
    asks="which of two solutions reaches a goal",
    kind=OPTIONS,
    fields=("goal",),
    prompt="Question: {goal}\nAnswer:",
    metric="options_per_character",
    protocol="acc_norm and acc of lm-evaluation-harness",
    licence="AFL-3.0",
    ways=(
        DataFiles(
            folder="piqa",
            names=(
                "train.jsonl",
                "train-labels.lst",
                "valid.jsonl",
                "valid-labels.lst",
            ),
            read="options:piqa",
            splits=OFFICIAL_DEV,
        ),
        DataFiles(
            folder="piqa",
            names=("valid.jsonl", "valid-labels.lst"),
            read="options:piqa_valid",
            splits=Splits(
                train="official dev rows, the first of all, not train rows",
                evaluation="official dev rows, the last of all",
            ),
        ),
        Hub(name="baber/piqa", read="options:piqa_row", splits=OFFICIAL_DEV),
    ),
)
