"""TriviaQA: trivia questions without a text; most answers have many accepted forms.

The rows are read from `triviaqa/` in the data directory: `topics.dpr.trivia.dev.txt`, a
part of the official training set, is used for training, and
`topics.dpr.trivia.test.txt`, the official unfiltered development set, for the score.
Scores are exact match and F1, normalised as in the official evaluation, and whether an
accepted answer appears in the generated text.
"""

from meft_bench.child.tasks import closed_book, topics
from meft_bench.child.tasks.question import AnswerTask
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source

DATA_SET = closed_book.DataSet(
    name="triviaqa",
    title="TriviaQA",
    train_file="topics.dpr.trivia.dev.txt",
    eval_file="topics.dpr.trivia.test.txt",
    eval_rows=topics.rows,
    metric="trivia_qa",
    prompt="Question: {question}\nAnswer:",
)


def load(cell: Cell, source: Source) -> AnswerTask:
    """Load TriviaQA as a task.

    Raises:
        MissingError: the files are not available.
    """
    return closed_book.load(cell, source, DATA_SET)
