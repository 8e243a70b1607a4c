"""Tasks of language models, from the rows that were found.

The prompt of a question is the one in the facts of its task. Rows to train with are
drawn by the seed, and those to score with are the first.
"""

from meft_bench.child.tasks.find import find
from meft_bench.child.tasks.question import AnswerTask, Question
from meft_bench.child.tasks.rows import RowDict
from meft_bench.child.tasks.task import draw, first
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source
from meft_bench.shared.tasks import TABLE
from meft_bench.shared.tasks.facts import OPTIONS, Facts


def load(cell: Cell, source: Source) -> AnswerTask:
    """Load the task that `cell` names.

    Args:
        cell: the cell, with the numbers of rows and the seed.
        source: where the rows may come from.

    Raises:
        MissingError: the rows are not available.
        ValueError: a row has no answer.
    """
    facts = TABLE[cell.task]
    found = find(facts, source)
    learned, scored = (
        [question_of(facts, row) for row in rows]
        for rows in (found.rows.train, found.rows.evaluation)
    )
    train, validation = draw(learned, cell)
    evaluation = first(scored, cell)
    return AnswerTask(
        name=facts.name,
        train=train,
        validation=validation,
        evaluation=evaluation,
        metric=facts.metric,
        max_new_tokens=facts.max_new_tokens,
        origin=found.origin(len(train), len(validation), len(evaluation)),
    )


def question_of(facts: Facts, row: RowDict) -> Question:
    """Return the question of a row.

    Args:
        facts: the facts of the task, which have the prompt.
        row: a row as it was read.

    Raises:
        ValueError: there is no answer.
    """
    fields = {name: row[name] for name in facts.fields}
    options = tuple(row["options"]) if facts.kind == OPTIONS else ()
    accepted = (options[row["right"]],) if options else tuple(row["accepted"])
    return Question(
        prompt=facts.prompt.format(**fields),
        answer=f" {accepted[0]}" if accepted else "",
        accepted=accepted,
        options=options,
        right=row["right"] if options else None,
    )
