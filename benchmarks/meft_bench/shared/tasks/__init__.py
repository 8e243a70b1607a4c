"""The tasks with rows, one file of facts each.

`facts` says which facts there are, and `document` writes docs/tasks.md from them.

cola sst2 mrpc stsb qqp mnli qnli rte wnli    GLUE
bbc_news                                      a classifier's default task
arc_easy arc_challenge openbookqa piqa boolq sciq    options
nq_open triviaqa squad gsm8k                  answers in words
facts_random facts_paraphrase                 facts made from a seed
fashion_mnist mnist digits                    images
"""

from meft_bench.shared.tasks import (
    arc_challenge,
    arc_easy,
    bbc_news,
    boolq,
    cola,
    digits,
    facts_paraphrase,
    facts_random,
    fashion_mnist,
    gsm8k,
    mnist,
    mnli,
    mrpc,
    nq_open,
    openbookqa,
    piqa,
    qnli,
    qqp,
    rte,
    sciq,
    squad,
    sst2,
    stsb,
    triviaqa,
    wnli,
)

_FILES = (
    *(bbc_news, cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli),
    *(nq_open, triviaqa, squad, gsm8k),
    *(facts_random, facts_paraphrase),
    *(arc_easy, arc_challenge, openbookqa, piqa, boolq, sciq),
    *(fashion_mnist, mnist, digits),
)

TABLE = {file.FACTS.name: file.FACTS for file in _FILES}
"""The facts of every task with rows by its name, in the order of the documentation."""
