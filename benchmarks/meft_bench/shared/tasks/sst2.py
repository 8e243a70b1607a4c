"""SST-2: the sentiment of a sentence from a film review (Socher et al., EMNLP 2013)."""

from meft_bench.shared.tasks.facts import LABELS, OFFICIAL_DEV, DataFiles, Facts, Hub

FACTS = Facts(
    name="sst2",
    title="GLUE SST-2",
    asks="whether a sentence from a film review is positive",
    kind=LABELS,
    fields=("sentence",),
    labels=("0", "1"),
    metric="accuracy",
    protocol="accuracy over all rows",
    licence="Stanford Sentiment Treebank, for research; no formal licence",
    ways=(
        DataFiles(
            folder="glue/SST-2",
            names=("train.tsv", "dev.tsv"),
            read="glue:tables",
            splits=OFFICIAL_DEV,
        ),
        Hub(
            name="nyu-mll/glue", config="sst2", read="glue:hub_row", splits=OFFICIAL_DEV
        ),
    ),
)
