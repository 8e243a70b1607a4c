"""OpenBookQA: elementary science facts, applied (Mihaylov et al., EMNLP 2018).

The prompt is the question alone, as in lm-evaluation-harness.
"""

from meft_bench.shared.tasks.facts import OFFICIAL_TEST, OPTIONS, DataFiles, Facts, Hub

FACTS = Facts(
    name="openbookqa",
    title="OpenBookQA",
    asks="the end of a sentence about elementary science",
    kind=OPTIONS,
    fields=("question",),
    prompt="{question}",
    metric="options_per_character",
    protocol="acc_norm and acc of lm-evaluation-harness",
    licence="Apache-2.0",
    ways=(
        DataFiles(
            folder="openbookqa",
            names=("train.json", "test.json"),
            read="options:instructions",
            splits=OFFICIAL_TEST,
        ),
        Hub(
            name="allenai/openbookqa",
            config="main",
            evaluation="test",
            read="options:openbookqa_row",
            splits=OFFICIAL_TEST,
        ),
    ),
)
