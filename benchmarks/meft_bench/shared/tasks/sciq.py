"""SciQ: science exam questions with a supporting text (Welbl et al., W-NUT 2017)."""

from meft_bench.shared.tasks.facts import OFFICIAL_TEST, OPTIONS, DataFiles, Facts, Hub

FACTS = Facts(
    name="sciq",
    title="SciQ",
    asks="the answer to a science question with a supporting text",
    kind=OPTIONS,
    fields=("support", "question"),
    prompt="{support}\nQuestion: {question}\nAnswer:",
    metric="options_per_character",
    protocol="acc_norm and acc of lm-evaluation-harness",
    licence="CC BY-NC 3.0",
    ways=(
        DataFiles(
            folder="sciq",
            names=("train.json", "test.json"),
            read="options:sciq",
            splits=OFFICIAL_TEST,
        ),
        Hub(
            name="allenai/sciq",
            evaluation="test",
            read="options:sciq_row",
            splits=OFFICIAL_TEST,
        ),
    ),
)
