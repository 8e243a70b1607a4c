"""Questions with options, in the files of their authors and of others, and of the hub.

    instructions              ARC and OpenBookQA in instruction form: one JSON list
    piqa, piqa_valid          PIQA's files, or those of its development rows only
    boolq, boolq_dev          BoolQ's files, or that of its development rows only
    sciq                      SciQ's files
    arc_row ... sciq_row      rows of the hub

The options have the order of lm-evaluation-harness.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from meft_bench.child.tasks.files import json_lines
from meft_bench.child.tasks.rows import Content, RowDict, SplitRows
from meft_bench.shared.tasks.facts import DataFiles

NUM_PIQA_TRAIN = 1_438
"""Number of PIQA's development rows to train with where there are no others."""
NO_YES = ("no", "yes")
_FORM = re.compile(
    r"question: (?P<question>.*?)\n\n(?P<options>Answer1:.*?)\n\nAnswer format",
    re.DOTALL,
)
_OPTION = re.compile(r"Answer\d: ")


def instructions(way: DataFiles, train: Content, test: Content) -> SplitRows:
    """Return the rows of two JSON lists of instructions and answers.

    Args:
        way: the way.
        train: the list to train with.
        test: the list to score with.
    """
    learned, scored = (
        [_instruction(row) for row in json.loads(content.text)]
        for content in (train, test)
    )
    return SplitRows(train=learned, evaluation=scored)


def _instruction(row: dict[str, str]) -> RowDict:
    form = _FORM.search(row["instruction"])
    if form is None:
        raise ValueError(f"not a question with options: {row['instruction']!r}")
    options = [text.strip() for text in _OPTION.split(form["options"])[1:]]
    right = int(row["answer"].removeprefix("answer")) - 1
    return {"question": form["question"].strip(), "options": options, "right": right}


def piqa(
    way: DataFiles,
    train: Content,
    train_labels: Content,
    valid: Content,
    valid_labels: Content,
) -> SplitRows:
    """Return PIQA's rows.

    Args:
        way: the way.
        train: the goals and solutions to train with.
        train_labels: which solution is right, a line for each.
        valid: those to score with.
        valid_labels: likewise.
    """
    return SplitRows(
        train=_piqa(train, train_labels), evaluation=_piqa(valid, valid_labels)
    )


def piqa_valid(way: DataFiles, valid: Content, labels: Content) -> SplitRows:
    """Return PIQA's development rows, the first of them to train with.

    Args:
        way: the way.
        valid: the goals and solutions.
        labels: which solution is right, a line for each.
    """
    rows = _piqa(valid, labels)
    return SplitRows(train=rows[:NUM_PIQA_TRAIN], evaluation=rows[NUM_PIQA_TRAIN:])


def _piqa(rows: Content, labels: Content) -> list[RowDict]:
    questions = json_lines(rows.text, str(rows.path))
    right = labels.text.split()
    if len(right) != len(questions):
        raise ValueError(
            f"{labels.path}: {len(right)} labels, expected {len(questions)}, one for "
            f"each row of {rows.path.name}"
        )
    return [
        piqa_row(row | {"label": int(label)})
        for row, label in zip(questions, right, strict=True)
    ]


def boolq(way: DataFiles, train: Content, dev: Content) -> SplitRows:
    """Return BoolQ's rows.

    Args:
        way: the way.
        train: the rows to train with.
        dev: the rows to score with.
    """
    learned, scored = (
        [boolq_row(row) for row in json_lines(content.text, str(content.path))]
        for content in (train, dev)
    )
    return SplitRows(train=learned, evaluation=scored)


def boolq_dev(way: DataFiles, dev: Content) -> SplitRows:
    """Return BoolQ's development rows; those of every fifth passage are scored.

    Args:
        way: the way.
        dev: the development rows.
    """
    rows = [boolq_row(row) for row in json_lines(dev.text, str(dev.path))]
    passages = list(dict.fromkeys(row["passage"] for row in rows))
    held_out = set(passages[::5])
    return SplitRows(
        train=[row for row in rows if row["passage"] not in held_out],
        evaluation=[row for row in rows if row["passage"] in held_out],
    )


def sciq(way: DataFiles, train: Content, test: Content) -> SplitRows:
    """Return SciQ's rows.

    Args:
        way: the way.
        train: a JSON list of rows to train with.
        test: a JSON list of rows to score with.
    """
    learned, scored = (
        [sciq_row(row) for row in json.loads(content.text)] for content in (train, test)
    )
    return SplitRows(train=learned, evaluation=scored)


def arc_row(row: dict[str, Any]) -> RowDict:
    """Return a row of ARC as the hub has it."""
    return _with_letters(row["question"], row["choices"], row["answerKey"])


def openbookqa_row(row: dict[str, Any]) -> RowDict:
    """Return a row of OpenBookQA as the hub has it."""
    return _with_letters(row["question_stem"], row["choices"], row["answerKey"])


def _with_letters(
    question: str, choices: dict[str, Sequence[str]], key: str
) -> RowDict:
    right = list(choices["label"]).index(key.strip())
    return {"question": question, "options": list(choices["text"]), "right": right}


def piqa_row(row: dict[str, Any]) -> RowDict:
    """Return a row of PIQA as the hub has it."""
    options = [row["sol1"], row["sol2"]]
    return {"goal": row["goal"], "options": options, "right": int(row["label"])}


def boolq_row(row: dict[str, Any]) -> RowDict:
    """Return a row of BoolQ as its authors' files and the hub have it."""
    return {
        "passage": row["passage"],
        "question": row["question"],
        "options": list(NO_YES),
        "right": int(row["answer"]),
    }


def sciq_row(row: dict[str, Any]) -> RowDict:
    """Return a row of SciQ as its authors' files and the hub have it."""
    wrong = [row[f"distractor{number}"] for number in (1, 2, 3)]
    return {
        "support": row["support"].lstrip(),
        "question": row["question"],
        "options": [*wrong, row["correct_answer"]],
        "right": 3,
    }
