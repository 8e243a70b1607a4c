"""A task from a user's rows, in files of any kind that `row_files` reads.

Which columns have the texts and labels, and which kind of task they are, is said by the
sweep (`meft_bench.shared.row_kinds`), and is checked here row by row: a missing value
or a label that is none is an error that names file and row. Rows are counted from 1,
without the line of column names.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from meft_bench.child.tasks import row_files
from meft_bench.child.tasks.question import AnswerTask, Question
from meft_bench.child.tasks.row_files import Rows
from meft_bench.child.tasks.task import Row, Task, draw, first
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import nearest

SPLIT_SEED = 0
"""Seed of the rows that are set aside for the score, the same for every cell."""
MOST_CLASSES = 1000

AnyRow = TypeVar("AnyRow", Row, Question)
Parts = tuple[tuple[AnyRow, ...], tuple[AnyRow, ...], tuple[AnyRow, ...], str]


def load(cell: Cell, its: dict[str, Any]) -> Task | AnswerTask:
    """Load a task of the user.

    Args:
        cell: the numbers of rows and the seed.
        its: the places of the rows, the columns, the kind and the metric, by the names
            that a sweep has for them.

    Raises:
        ValueError: a file cannot be read, or a row lacks what the kind needs.
    """
    kind = its["kind"]
    wanted: Callable[[Rows, int, str], int | float] | None = None
    num_labels: int | None = None
    if kind in ("options", "generation"):
        return _questions(cell, its)
    files = _files(its)
    if kind == "classification":
        classes = _classes(files["train"], its["label"])
        wanted = _labels(classes, files["train"])
        num_labels = len(classes)
    elif kind == "regression":
        wanted, num_labels = _number, 1

    def rows_of(rows: Rows) -> list[Row]:
        return [_row(rows, index, its, wanted) for index in range(len(rows))]

    train, validation, evaluation, origin = _parts(cell, its, files, rows_of)
    return Task(
        name=cell.task,
        num_labels=num_labels,
        train=train,
        validation=validation,
        evaluation=evaluation,
        metric=its["metric"],
        origin=origin,
    )


def _questions(cell: Cell, its: dict[str, Any]) -> AnswerTask:
    has_options = its["kind"] == "options"

    def rows_of(rows: Rows) -> list[Question]:
        return [_question(rows, index, its) for index in range(len(rows))]

    train, validation, evaluation, origin = _parts(cell, its, _files(its), rows_of)
    return AnswerTask(
        name=cell.task,
        train=train,
        validation=validation,
        evaluation=evaluation,
        metric=its["metric"],
        max_new_tokens=0 if has_options else its["max_new_tokens"],
        origin=origin,
        stop="",
    )


def _files(its: dict[str, Any]) -> dict[str, Rows]:
    """Return the rows of each file, by the split that it is."""
    splits = ("train", "validation", "evaluation")
    return {
        split: row_files.read(its[split])
        for split in splits
        if isinstance(its.get(split), str)
    }


def _parts(
    cell: Cell,
    its: dict[str, Any],
    files: dict[str, Rows],
    rows_of: Callable[[Rows], list[AnyRow]],
) -> "Parts[AnyRow]":
    """Return the rows of the three splits, and a description of where they are from."""
    learned = rows_of(files["train"])
    num_rows = len(learned)
    if "evaluation" in files:
        scored = rows_of(files["evaluation"])
        how = "in a file of its own"
    else:
        share = its["evaluation"]
        random.Random(SPLIT_SEED).shuffle(learned)
        num_scored = round(share * num_rows)
        if not 0 < num_scored < num_rows:
            raise ValueError(
                f"{files['train'].file}: `evaluation` = {share} of {num_rows} rows "
                f"leaves {num_scored} to score and {num_rows - num_scored} to train "
                "with: name a file as `evaluation`, or add rows"
            )
        scored, learned = learned[:num_scored], learned[num_scored:]
        how = f"a fixed share of {share:g}"
    train, validation = draw(learned, cell)
    if "validation" in files:
        # The tenth that is set aside otherwise is trained with, too.
        train = train + validation
        validation = tuple(rows_of(files["validation"]))
    evaluation = first(scored, cell)
    digests = ", ".join(f"{split} {sha[:12]}" for split, sha in its["digests"].items())
    origin = (
        f"{its['kind']} from files of the user (sha256: {digests}); train {len(train)} "
        f"and selection {len(validation)} of {num_rows} rows, score {len(evaluation)} "
        f"of {len(scored)} rows, {how}"
    )
    return train, validation, evaluation, origin


def _value(rows: Rows, index: int, column: str) -> Any:
    """Return a value.

    Raises:
        ValueError: there is no such column, or no value in this row.
    """
    if column not in rows.columns:
        hint = nearest(column, rows.columns)
        raise ValueError(f"{rows.file}: there is no column {column!r}; {hint}")
    value = rows.columns[column][index]
    is_missing = value is None or (isinstance(value, str) and not value.strip())
    if is_missing or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(
            f"{rows.file}, row {index + 1}: no value in column {column!r}: fill it in, "
            "or remove the row"
        )
    return value


def _text(rows: Rows, index: int, column: str) -> str:
    value = _value(rows, index, column)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(
            f"{rows.file}, row {index + 1}: {value!r:.60} in column {column!r} should "
            "be text"
        )
    return str(value)


def _row(
    rows: Rows,
    index: int,
    its: dict[str, Any],
    label_of: Callable[[Rows, int, str], int | float] | None,
) -> Row:
    columns = [its["text"], *filter(None, [its.get("text_pair")])]
    texts = tuple(_text(rows, index, column) for column in columns)
    label = 0 if label_of is None else label_of(rows, index, its["label"])
    return Row(texts, label)


def _number(rows: Rows, index: int, column: str) -> float:
    value = _value(rows, index, column)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(
            f"{rows.file}, row {index + 1}: {value!r:.60} in column {column!r} should "
            "be a finite number, as `kind` is 'regression'"
        )
    return number


def _class(rows: Rows, index: int, column: str) -> str | int:
    value = _value(rows, index, column)
    if isinstance(value, int) and column in rows.class_names:
        names = rows.class_names[column]
        if not 0 <= value < len(names):  # `datasets` hides labels as -1
            raise ValueError(
                f"{rows.file}, row {index + 1}: {value} in column {column!r} is the "
                f"number of no class, of which there are {len(names)}: remove rows "
                "without a label"
            )
        return names[value]
    if not isinstance(value, str | int):
        raise ValueError(
            f"{rows.file}, row {index + 1}: {value!r:.60} in column {column!r} should "
            "be text or a whole number; numbers are learned with `kind` = 'regression'"
        )
    return int(value) if isinstance(value, bool) else value


def _classes(rows: Rows, column: str) -> list[str]:
    """Return the names of the classes of the training rows, in order."""
    found = {str(_class(rows, index, column)) for index in range(len(rows))}
    if column in rows.class_names:
        return rows.class_names[column]
    if len(found) < 2:
        raise ValueError(
            f"{rows.file}: every row has the same value in column {column!r}, and "
            "there is nothing to learn: take another column, or `kind` = 'regression'"
        )
    if len(found) > MOST_CLASSES:
        raise ValueError(
            f"{rows.file}: {len(found)} different values in column {column!r}, at most "
            f"{MOST_CLASSES} are classes: take `kind` = 'regression', or another column"
        )
    try:
        return sorted(found, key=int)
    except ValueError:
        return sorted(found)


def _labels(classes: Sequence[str], train: Rows) -> Callable[[Rows, int, str], int]:
    """Return the function that gives the number of the class of a row."""
    numbers = {name: number for number, name in enumerate(classes)}

    def label_of(rows: Rows, index: int, column: str) -> int:
        name = str(_class(rows, index, column))
        if name not in numbers:
            raise ValueError(
                f"{rows.file}, row {index + 1}: no row of {train.file} has the label "
                f"{name!r}; {nearest(name, numbers)}"
            )
        return numbers[name]

    return label_of


def _question(rows: Rows, index: int, its: dict[str, Any]) -> Question:
    prompt = _text(rows, index, its["prompt"]).rstrip()
    value = _value(rows, index, its["answer"])
    accepted = _texts(rows, index, its["answer"]) if _is_list(value) else ()
    accepted = accepted or (_text(rows, index, its["answer"]).strip(),)
    if not all(accepted):
        raise ValueError(
            f"{rows.file}, row {index + 1}: an empty answer in column "
            f"{its['answer']!r}: remove it"
        )
    if its["kind"] == "generation":
        return Question(prompt=prompt, answer=f" {accepted[0]}", accepted=accepted)
    options = _options(rows, index, its["options"])
    answer = value if isinstance(value, int) else accepted[0]
    right = _right(answer, options, rows, index, its["answer"])
    return Question(
        prompt=prompt, answer=f" {right}", accepted=(right,), options=options
    )


def _options(rows: Rows, index: int, columns: str | list[str]) -> tuple[str, ...]:
    if isinstance(columns, list):
        options = tuple(_text(rows, index, column).strip() for column in columns)
    else:
        value = _value(rows, index, columns)
        if not _is_list(value):
            raise ValueError(
                f"{rows.file}, row {index + 1}: {value!r:.60} in column {columns!r} "
                "should be a list of options; columns with one option each are named "
                "as a list, `options` = ['A', 'B']"
            )
        options = _texts(rows, index, columns)
    if len(set(options)) < len(options) or len(options) < 2 or not all(options):
        raise ValueError(
            f"{rows.file}, row {index + 1}: options {list(options)!r:.80} should be "
            "two or more, all different, none of them empty"
        )
    return options


def _texts(rows: Rows, index: int, column: str) -> tuple[str, ...]:
    """Return the texts of a list; whole numbers are texts, too."""
    values = _value(rows, index, column)
    for value in values:
        # Readers of files make dates of some texts, and fractions of some numbers.
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(
                f"{rows.file}, row {index + 1}: {value!r:.60} in a list of column "
                f"{column!r} should be text"
            )
    return tuple(str(value).strip() for value in values)


def _right(
    answer: str | int, options: tuple[str, ...], rows: Rows, index: int, column: str
) -> str:
    """Return the option that an answer names by its text or its number from 0.

    Raises:
        ValueError: it is neither, or a text that is both, of different options.
    """
    if isinstance(answer, int):
        if 0 <= answer < len(options):
            return options[answer]
        answer = str(answer)
    is_number = answer.isdecimal() and int(answer) < len(options)
    if answer in options and is_number and options[int(answer)] != answer:
        raise ValueError(
            f"{rows.file}, row {index + 1}: {answer!r} in column {column!r} is one of "
            f"the options {list(options)!r:.120}, and the number of another: name "
            "options by other texts, or answers by numbers in JSON"
        )
    if answer in options:
        return answer
    if is_number:
        return options[int(answer)]
    raise ValueError(
        f"{rows.file}, row {index + 1}: {answer!r:.60} in column {column!r} should be "
        f"one of the options {list(options)!r:.120}, or its number from 0"
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0
