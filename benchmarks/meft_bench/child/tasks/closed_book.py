"""Questions that are answered without a text, from two files of a data set.

A part of the official training set, a file of `topics`, is used for training; the
official development set, for the score. The two share no question.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from meft_bench.child.tasks import topics
from meft_bench.child.tasks.files import read
from meft_bench.child.tasks.question import AnswerTask, Question
from meft_bench.child.tasks.task import draw, first
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source

INSTEAD = "or take task `bbc-news`, whose text is in a package"

Rows = Iterable[tuple[str, list[str]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """Where the questions of a task are, and how they are scored.

    Attributes:
        name: name of the task, and of its folder in the data directory.
        title: name of the data set, for the record.
        train_file: name of the file to train with.
        eval_file: name of the file to score with.
        eval_rows: reads questions and their accepted answers from the text of
            `eval_file`; called with the text and the name.
        metric: name of the metric, one of `scoring.rules`.
        prompt: the prompt, with `{question}`.
    """

    name: str
    title: str
    train_file: str
    eval_file: str
    eval_rows: Callable[[str, str], Rows]
    metric: str
    prompt: str


def load(cell: Cell, source: Source, its: DataSet) -> AnswerTask:
    """Load a data set as a task.

    In training, the first answer in the order of the file follows the question.

    Args:
        cell: the numbers of rows and the seed.
        source: where the files are.
        its: the data set.

    Returns:
        The task.

    Raises:
        MissingError: the files are not available.
    """
    train_text, train_sha256 = read(source, its.name, its.train_file, INSTEAD)
    eval_text, eval_sha256 = read(source, its.name, its.eval_file, INSTEAD)
    learned = _questions(its, topics.rows(train_text, its.train_file))
    scored = _questions(its, its.eval_rows(eval_text, its.eval_file))
    train, validation = draw(learned, cell)
    evaluation = first(scored, cell)
    return AnswerTask(
        name=its.name,
        train=train,
        validation=validation,
        evaluation=evaluation,
        metric=its.metric,
        max_new_tokens=32,
        origin=(
            f"{its.title} from files {its.train_file} (sha256 {train_sha256[:12]}) and "
            f"{its.eval_file} (sha256 {eval_sha256[:12]}); train {len(train)} and "
            f"selection {len(validation)} of {len(learned)} official train rows (a "
            f"part of all), score {len(evaluation)} of {len(scored)} official dev rows"
        ),
    )


def _questions(its: DataSet, rows: Rows) -> list[Question]:
    return [
        Question(
            prompt=its.prompt.format(question=text),
            answer=f" {answers[0]}",
            accepted=tuple(answers),
        )
        for text, answers in rows
    ]
