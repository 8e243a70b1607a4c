"""GSM8K: word problems of grade-school mathematics, solved in steps.

Read from `gsm8k/train.jsonl` and `gsm8k/test.jsonl` in the data directory, the official
splits. An answer is right if the number after its last `####` is.
"""

import json

from meft_bench.cell import Cell
from meft_bench.source import Source
from meft_bench.tasks.files import read
from meft_bench.tasks.question import AnswerTask, Question
from meft_bench.tasks.task import draw, first

FOLDER, TRAIN, TEST = "gsm8k", "train.jsonl", "test.jsonl"
INSTEAD = "or take task `bbc-news`, whose text is in a package"
MARK = "####"


def load(cell: Cell, source: Source) -> AnswerTask:
    """GSM8K as a task.

    Raises:
        MissingError: the files are not at hand.
    """
    train_text, train_sha256 = read(source, FOLDER, TRAIN, INSTEAD)
    test_text, test_sha256 = read(source, FOLDER, TEST, INSTEAD)
    learned, scored = (
        [_question(json.loads(line)) for line in text.splitlines()]
        for text in (train_text, test_text)
    )
    train, validation = draw(learned, cell)
    evaluation = first(scored, cell)
    return AnswerTask(
        name="gsm8k",
        train=train,
        validation=validation,
        evaluation=evaluation,
        metric="number",
        max_new_tokens=160,
        origin=(
            f"GSM8K from files {TRAIN} (sha256 {train_sha256[:12]}) and {TEST} (sha256 "
            f"{test_sha256[:12]}); train {len(train)} and selection {len(validation)} "
            f"of {len(learned)} official train rows, score {len(evaluation)} of "
            f"{len(scored)} official test rows"
        ),
    )


def _question(row: dict[str, str]) -> Question:
    return Question(
        prompt=f"Question: {row['question']}\nAnswer:",
        answer=f" {row['answer']}",
        accepted=(row["answer"].rpartition(MARK)[2].strip(),),
    )
