"""WNLI: whether a sentence with its pronoun replaced follows
(Levesque et al., KR 2012).

The development rows contradict the training rows: a pair of sentences with one word
changed has opposite labels. Models that learn the training rows score below the
majority class.
"""

from meft_bench.shared.tasks.facts import LABELS, OFFICIAL_DEV, DataFiles, Facts, Hub

FACTS = Facts(
    name="wnli",
    title="GLUE WNLI",
    asks="whether a sentence with its pronoun replaced follows",
    kind=LABELS,
    fields=("sentence1", "sentence2"),
    labels=("0", "1"),
    metric="accuracy",
    protocol="accuracy over all rows",
    licence="CC BY 4.0",
    ways=(
        DataFiles(
            folder="glue/WNLI",
            names=("train.tsv", "dev.tsv"),
            read="glue:tables",
            splits=OFFICIAL_DEV,
        ),
        Hub(
            name="nyu-mll/glue", config="wnli", read="glue:hub_row", splits=OFFICIAL_DEV
        ),
    ),
)
