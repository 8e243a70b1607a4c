"""GSM8K: word problems of grade-school mathematics, solved in steps
(Cobbe et al., 2021).

An answer is right by the official rule: the number after its first `#### ` equals that
of the solution.
"""

from meft_bench.shared.tasks.facts import OFFICIAL_TEST, WORDS, DataFiles, Facts, Hub

FACTS = Facts(
    name="gsm8k",
    title="GSM8K",
    asks="the solution of a word problem, in steps",
    kind=WORDS,
    fields=("question",),
    prompt="Question: {question}\nAnswer:",
    max_new_tokens=400,
    metric="gsm8k",
    protocol="the number after `#### `, as in grade_school_math/dataset.py",
    licence="MIT",
    ways=(
        DataFiles(
            folder="gsm8k",
            names=("train.jsonl", "test.jsonl"),
            read="words:gsm8k",
            splits=OFFICIAL_TEST,
        ),
        Hub(
            name="openai/gsm8k",
            config="main",
            evaluation="test",
            read="words:gsm8k_row",
            splits=OFFICIAL_TEST,
        ),
    ),
)
