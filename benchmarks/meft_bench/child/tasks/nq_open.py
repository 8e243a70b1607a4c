"""NQ-open: questions that people entered in a search engine, answered without a text.

The rows are read from `nq-open/` in the data directory: `topics.nq.dev.txt`, a part of
the official training set, is used for training, and `NQ-open.dev.jsonl`, the official
development set, for the score. Scores are exact match and F1, normalised as in the
official evaluation, and whether an accepted answer appears in the generated text (Hao
et al., ACL 2024, and their code).
"""

from meft_bench.child.tasks import closed_book
from meft_bench.child.tasks.files import json_lines
from meft_bench.child.tasks.question import AnswerTask
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source


def _rows(text: str, name: str) -> closed_book.Rows:
    return [(row["question"], row["answer"]) for row in json_lines(text, name)]


DATA_SET = closed_book.DataSet(
    name="nq-open",
    title="NQ-open",
    train_file="topics.nq.dev.txt",
    eval_file="NQ-open.dev.jsonl",
    eval_rows=_rows,
    metric="nq_open",
    prompt="Question: {question}?\nAnswer:",
)


def load(cell: Cell, source: Source) -> AnswerTask:
    """Load NQ-open as a task.

    Raises:
        MissingError: the files are not available.
    """
    return closed_book.load(cell, source, DATA_SET)
