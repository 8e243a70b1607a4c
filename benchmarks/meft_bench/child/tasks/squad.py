"""SQuAD, the part of its development set that is in XQuAD: texts with questions.

The rows are read from `squad-xquad-en/xquad.en.json` in the data directory. The file
does not contain the full training set, so four of five articles are used for training
and the fifth for the score; a score is therefore not comparable with published SQuAD
scores. Scores are exact match and F1 as defined by SQuAD 1.1, and whether an accepted
answer appears in the generated text.
"""

import json

from meft_bench.child.tasks.files import read
from meft_bench.child.tasks.question import AnswerTask, Question
from meft_bench.child.tasks.task import draw, first
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source

FOLDER, FILE = "squad-xquad-en", "xquad.en.json"
INSTEAD = "or take task `bbc-news`, whose text is in a package"


def load(cell: Cell, source: Source) -> AnswerTask:
    """Load XQuAD-en as a task.

    Raises:
        MissingError: the file is not available.
    """
    text, sha256 = read(source, FOLDER, FILE, INSTEAD)
    articles = [_questions(article) for article in json.loads(text)["data"]]
    held_out = articles[::5]
    learned = [q for i, article in enumerate(articles) if i % 5 for q in article]
    scored = [question for article in held_out for question in article]
    train, validation = draw(learned, cell)
    evaluation = first(scored, cell)
    return AnswerTask(
        name="squad",
        train=train,
        validation=validation,
        evaluation=evaluation,
        metric="squad",
        max_new_tokens=32,
        origin=(
            f"XQuAD-en, a part of SQuAD's dev set, from file {FILE} (sha256 "
            f"{sha256[:12]}); train {len(train)} and selection {len(validation)} rows "
            f"of four articles in five, score {len(evaluation)} of the {len(scored)} "
            f"rows of the others"
        ),
    )


def _questions(article: dict[str, list[dict[str, object]]]) -> list[Question]:
    return [
        Question(
            prompt=f"{paragraph['context']}\nQuestion: {row['question']}\nAnswer:",
            answer=f" {row['answers'][0]['text']}",
            accepted=tuple(answer["text"] for answer in row["answers"]),
        )
        for paragraph in article["paragraphs"]
        for row in paragraph["qas"]  # type: ignore[attr-defined]
    ]
