"""NQ-open: questions that people entered in a search engine, answered without a text.

The rows are read from `nq-open/` in the data directory: `topics.nq.dev.txt`, a part of
the official training set, is used for training, and `NQ-open.dev.jsonl`, the official
development set, for the score; they share no question. Scores are exact match and F1,
normalised as in the official evaluation, and whether an accepted answer appears in the
generated text (Hao et al., ACL 2024, and their code).
"""

from meft_bench.child.tasks import topics
from meft_bench.child.tasks.files import json_lines, read
from meft_bench.child.tasks.question import AnswerTask, Question
from meft_bench.child.tasks.task import draw, first
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source

FOLDER, TRAIN, DEV = "nq-open", "topics.nq.dev.txt", "NQ-open.dev.jsonl"
INSTEAD = "or take task `bbc-news`, whose text is in a package"


def load(cell: Cell, source: Source) -> AnswerTask:
    """Load NQ-open as a task.

    Raises:
        MissingError: the files are not available.
    """
    train_text, train_sha256 = read(source, FOLDER, TRAIN, INSTEAD)
    dev_text, dev_sha256 = read(source, FOLDER, DEV, INSTEAD)
    learned = [_question(*row) for row in topics.rows(train_text, TRAIN)]
    scored = [
        _question(row["question"], row["answer"]) for row in json_lines(dev_text, DEV)
    ]
    train, validation = draw(learned, cell)
    evaluation = first(scored, cell)
    return AnswerTask(
        name="nq-open",
        train=train,
        validation=validation,
        evaluation=evaluation,
        metric="nq_open",
        max_new_tokens=32,
        origin=(
            f"NQ-open from files {TRAIN} (sha256 {train_sha256[:12]}) and {DEV} "
            f"(sha256 {dev_sha256[:12]}); train {len(train)} and selection "
            f"{len(validation)} of {len(learned)} official train rows (a part of all), "
            f"score {len(evaluation)} of {len(scored)} official dev rows"
        ),
    )


def _question(text: str, answers: list[str]) -> Question:
    return Question(
        prompt=f"Question: {text}?\nAnswer:",
        answer=f" {answers[0]}",
        accepted=tuple(answers),
    )
