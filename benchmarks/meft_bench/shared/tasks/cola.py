"""CoLA: whether a sentence is acceptable English (Warstadt et al., TACL 2019).

Its files have no header line. The score is Matthews' correlation, 0 for any constant
answer.
"""

from meft_bench.shared.tasks.facts import LABELS, OFFICIAL_DEV, DataFiles, Facts, Hub

FACTS = Facts(
    name="cola",
    title="GLUE CoLA",
    asks="whether a sentence is acceptable English",
    kind=LABELS,
    fields=("sentence",),
    labels=("0", "1"),
    metric="matthews_correlation",
    protocol="Matthews' correlation over all rows",
    licence="published linguistics examples, for research; no formal licence",
    ways=(
        DataFiles(
            folder="glue/CoLA",
            names=("train.tsv", "dev.tsv"),
            read="glue:tables",
            splits=OFFICIAL_DEV,
            columns=("source", "label", "mark", "sentence"),
        ),
        Hub(
            name="nyu-mll/glue", config="cola", read="glue:hub_row", splits=OFFICIAL_DEV
        ),
    ),
)
