"""Random facts: a made-up name, and 24 random tokens that belong to it.

    one fact = 24 tokens, each one of 4,096, with equal probability:
               24 * log2(4096) = 288 bits that nothing but training can give

So many bits that the capacity of what is trained can be the limit (Allen-Zhu and Li,
2024: about two bits for each parameter). A fact is recalled if all of its tokens follow
from its name, which is what greedy generation writes.
"""

from meft_bench.shared.tasks.facts import RECALL, Facts, FromSeed, Splits

NUM_TOKENS = 24
"""Number of random tokens of a fact."""
NUM_SYMBOLS = 4096
"""Number of tokens of the vocabulary that they are drawn from."""

FACTS = Facts(
    name="facts-random",
    title="random facts",
    asks="the 24 random tokens that belong to a made-up name",
    kind=RECALL,
    fields=("name",),
    prompt="The code of {name} is:",
    metric="recall",
    protocol="all tokens of a fact are right, which is exact recall",
    licence="none, as they are random",
    ways=(
        FromSeed(
            read="facts:random_tokens",
            splits=Splits(train="made facts", evaluation="the same facts"),
        ),
    ),
)
