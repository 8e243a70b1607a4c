"""GSM8K: word problems of grade-school mathematics, solved in steps.

The rows are read from `gsm8k/train.jsonl` and `gsm8k/test.jsonl` in the data directory,
the official splits. An answer is right by the official rule: the number after its first
`#### ` equals that of the solution.
"""

import re

from meft_bench.child.tasks.files import json_lines, read
from meft_bench.child.tasks.question import AnswerTask, Question
from meft_bench.child.tasks.task import draw, first
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source

FOLDER, TRAIN, TEST = "gsm8k", "train.jsonl", "test.jsonl"
FINAL_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
INSTEAD = "or take task `bbc-news`, whose text is in a package"


def load(cell: Cell, source: Source) -> AnswerTask:
    """Load GSM8K as a task.

    Raises:
        MissingError: the files are not available.
    """
    train_text, train_sha256 = read(source, FOLDER, TRAIN, INSTEAD)
    test_text, test_sha256 = read(source, FOLDER, TEST, INSTEAD)
    learned, scored = (
        [_question(row) for row in json_lines(text, name)]
        for text, name in ((train_text, TRAIN), (test_text, TEST))
    )
    train, validation = draw(learned, cell)
    evaluation = first(scored, cell)
    return AnswerTask(
        name="gsm8k",
        train=train,
        validation=validation,
        evaluation=evaluation,
        metric="gsm8k",
        max_new_tokens=400,
        origin=(
            f"GSM8K from files {TRAIN} (sha256 {train_sha256[:12]}) and {TEST} (sha256 "
            f"{test_sha256[:12]}); train {len(train)} and selection {len(validation)} "
            f"of {len(learned)} official train rows, score {len(evaluation)} of "
            f"{len(scored)} official test rows"
        ),
    )


def final_number(text: str) -> str | None:
    """Return the number after the first `#### ` without its commas; None without one.

    It is compared as text, as in OpenAI's grade_school_math/dataset.py.
    """
    found = FINAL_NUMBER.search(text)
    return found[1].replace(",", "") if found else None


def _question(row: dict[str, str]) -> Question:
    if final_number(row["answer"]) is None:
        raise ValueError(
            f"a solution of GSM8K has no number after `#### `: {row['answer'][-60:]!r}"
        )
    return Question(
        prompt=f"Question: {row['question']}\nAnswer:",
        answer=f" {row['answer']}",
        accepted=(row["answer"],),
    )
