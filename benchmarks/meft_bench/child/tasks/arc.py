"""ARC-Easy and ARC-Challenge: science questions of school exams, with options.

The rows are read from `arc-easy/` and `arc-challenge/` in the data directory:
`train.json` and `test.json`, the official splits, in instruction form. The option with
the largest log-likelihood per byte is chosen, as by lm-evaluation-harness's `acc_bytes`
(its `acc_norm`, where all characters are ASCII).
"""

import json
import re

from meft_bench.child.tasks.files import read
from meft_bench.child.tasks.question import AnswerTask, Question
from meft_bench.child.tasks.task import draw, first
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source

TRAIN, TEST = "train.json", "test.json"
INSTEAD = "or take task `bbc-news`, whose text is in a package"
_FORM = re.compile(
    r"question: (?P<question>.*?)\n\n(?P<options>Answer1:.*?)\n\nAnswer format",
    re.DOTALL,
)
_OPTION = re.compile(r"Answer\d: ")


def load_easy(cell: Cell, source: Source) -> AnswerTask:
    """Load ARC-Easy as a task."""
    return _load("arc-easy", cell, source)


def load_challenge(cell: Cell, source: Source) -> AnswerTask:
    """Load ARC-Challenge as a task."""
    return _load("arc-challenge", cell, source)


def _load(name: str, cell: Cell, source: Source) -> AnswerTask:
    train_text, train_sha256 = read(source, name, TRAIN, INSTEAD)
    test_text, test_sha256 = read(source, name, TEST, INSTEAD)
    learned, scored = (
        [_question(row) for row in json.loads(text)] for text in (train_text, test_text)
    )
    train, validation = draw(learned, cell)
    evaluation = first(scored, cell)
    return AnswerTask(
        name=name,
        train=train,
        validation=validation,
        evaluation=evaluation,
        metric="options",
        max_new_tokens=0,
        origin=(
            f"{name} from files {TRAIN} (sha256 {train_sha256[:12]}) and {TEST} (sha256"
            f" {test_sha256[:12]}); train {len(train)} and selection {len(validation)} "
            f"of {len(learned)} official train rows, score {len(evaluation)} of "
            f"{len(scored)} official test rows"
        ),
    )


def _question(row: dict[str, str]) -> Question:
    form = _FORM.search(row["instruction"])
    if form is None:
        raise ValueError(f"not a question with options: {row['instruction']!r}")
    options = [text.strip() for text in _OPTION.split(form["options"])[1:]]
    right = options[int(row["answer"].removeprefix("answer")) - 1]
    return Question(
        prompt=f"Question: {form['question'].strip()}\nAnswer:",
        answer=f" {right}",
        accepted=(right,),
        options=tuple(options),
    )
