"""RTE: whether one sentence follows from another (Dagan et al., 2005).

The rows are those of four rounds of the challenge.
"""

from meft_bench.shared.tasks.facts import LABELS, OFFICIAL_DEV, DataFiles, Facts, Hub

FACTS = Facts(
    name="rte",
    title="GLUE RTE",
    asks="whether one sentence follows from another",
    kind=LABELS,
    fields=("sentence1", "sentence2"),
    labels=("entailment", "not_entailment"),
    metric="accuracy",
    protocol="accuracy over all rows",
    licence="PASCAL RTE, free for research; no formal licence",
    ways=(
        DataFiles(
            folder="glue/RTE",
            names=("train.tsv", "dev.tsv"),
            read="glue:tables",
            splits=OFFICIAL_DEV,
        ),
        Hub(
            name="nyu-mll/glue", config="rte", read="glue:hub_row", splits=OFFICIAL_DEV
        ),
    ),
)
