"""MRPC: whether two sentences have the same meaning (Dolan and Brockett, IWP 2005).

GLUE's development set consists of the pairs of the original training file whose two ids
are in `dev_ids.tsv`; the ready-made `train.tsv` in circulation lacks a row.
"""

from meft_bench.shared.tasks.facts import LABELS, OFFICIAL_DEV, DataFiles, Facts, Hub

COLUMNS = (
    ("#1 String", "sentence1"),
    ("#2 String", "sentence2"),
    ("Quality", "label"),
)

FACTS = Facts(
    name="mrpc",
    title="GLUE MRPC",
    asks="whether two sentences have the same meaning",
    kind=LABELS,
    fields=("sentence1", "sentence2"),
    labels=("0", "1"),
    metric="accuracy_and_f1",
    protocol="accuracy, and F1 of label 1, over all rows",
    licence="Microsoft Research Paraphrase Corpus, for research",
    ways=(
        DataFiles(
            folder="glue/MRPC",
            names=("msr_paraphrase_train.txt", "dev_ids.tsv"),
            read="glue:mrpc_originals",
            splits=OFFICIAL_DEV,
            renamed=COLUMNS,
        ),
        DataFiles(
            folder="glue/MRPC",
            names=("train.tsv", "dev.tsv"),
            read="glue:tables",
            splits=OFFICIAL_DEV,
            renamed=COLUMNS,
        ),
        Hub(
            name="nyu-mll/glue", config="mrpc", read="glue:hub_row", splits=OFFICIAL_DEV
        ),
    ),
)
