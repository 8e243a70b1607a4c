"""STS-B: how similar two sentences are, from 0 to 5 (Cer et al., SemEval 2017).

A regression: the head has one output, which is trained by the mean squared error. The
weights are selected by Pearson's correlation.
"""

from meft_bench.shared.tasks.facts import NUMBER, OFFICIAL_DEV, DataFiles, Facts, Hub

FACTS = Facts(
    name="stsb",
    title="GLUE STS-B",
    asks="how similar two sentences are, from 0 to 5",
    kind=NUMBER,
    fields=("sentence1", "sentence2"),
    metric="pearson_and_spearman",
    protocol=(
        "Pearson's and Spearman's correlation over all rows, undefined if all "
        "predictions are equal"
    ),
    licence="CC BY-SA 4.0 and others, as in the licence file of its authors",
    ways=(
        DataFiles(
            folder="glue/STS-B",
            names=("train.tsv", "dev.tsv"),
            read="glue:tables",
            splits=OFFICIAL_DEV,
            renamed=(("score", "label"),),
        ),
        Hub(
            name="nyu-mll/glue", config="stsb", read="glue:hub_row", splits=OFFICIAL_DEV
        ),
    ),
)
