"""ARC-Challenge: science questions of school exams with options, those on which
simple methods fail (Clark et al., 2018).
"""

from meft_bench.shared.tasks.facts import OFFICIAL_TEST, OPTIONS, DataFiles, Facts, Hub

FACTS = Facts(
    name="arc-challenge",
    title="ARC-Challenge",
    asks="the answer to a question of a science exam",
    kind=OPTIONS,
    fields=("question",),
    prompt="Question: {question}\nAnswer:",
    metric="options_per_character",
    protocol="acc_norm and acc of lm-evaluation-harness",
    licence="CC BY-SA 4.0",
    ways=(
        DataFiles(
            folder="arc-challenge",
            names=("train.json", "test.json"),
            read="options:instructions",
            splits=OFFICIAL_TEST,
        ),
        Hub(
            name="allenai/ai2_arc",
            config="ARC-Challenge",
            evaluation="test",
            read="options:arc_row",
            splits=OFFICIAL_TEST,
        ),
    ),
)
