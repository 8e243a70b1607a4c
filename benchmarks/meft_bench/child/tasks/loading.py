"""The task of a cell: one of ours, rows of the user, or a function of the user.

NAME                      one of the table of tasks
data:KIND-DIGEST          rows in files of the user
python:MODULE:FUNCTION    a function `load(cell, source) -> Task` of the user
"""

from meft_bench.child.own import code
from meft_bench.child.tasks.question import AnswerTask
from meft_bench.child.tasks.recall import RecallTask
from meft_bench.child.tasks.task import Task
from meft_bench.shared.cell import Cell
from meft_bench.shared.own import PYTHON
from meft_bench.shared.registry import TASKS, load
from meft_bench.shared.source import Source


def load_task(cell: Cell, source: Source) -> Task | AnswerTask | RecallTask:
    """Load the task of a cell.

    Args:
        cell: the cell, which names it.
        source: where its rows are.

    Raises:
        MissingError: its data are not available.
        ValueError: its data are not right.
    """
    if source.rows is not None:
        from meft_bench.child.tasks import own_rows  # datasets takes a second

        return own_rows.load(cell, source.rows)
    if cell.task.startswith(PYTHON):
        made = code.load(cell.task, "task")(cell, source)
        if not isinstance(made, Task | AnswerTask):
            raise ValueError(
                f"task {cell.task!r} returned {type(made).__name__}, expected a `Task` "
                "of meft_bench.child.tasks.task, or an `AnswerTask` of "
                "meft_bench.child.tasks.question"
            )
        return made
    found: Task | AnswerTask | RecallTask = load(TASKS[cell.task])(cell, source)
    return found
