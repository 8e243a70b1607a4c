"""Questions with accepted answers, in the files of their authors and of the hub.

topics, nq_open_topics      Anserini's files of topics
nq_open, squad, gsm8k       the official files
xquad                       the part of SQuAD's development rows that is in XQuAD
nq_open_row ... gsm8k_row   rows of the hub
"""

import json
from typing import Any

from meft_bench.child.tasks.files import json_lines
from meft_bench.child.tasks.formats.topics import rows as topic_rows
from meft_bench.child.tasks.gsm8k import final_number
from meft_bench.child.tasks.rows import Content, RowDict, SplitRows
from meft_bench.shared.tasks.facts import DataFiles


def topics(way: DataFiles, train: Content, test: Content) -> SplitRows:
    """Return the rows of two files of topics.

    Args:
        way: the way.
        train: the topics to train with.
        test: the topics to score with.
    """
    return SplitRows(train=_topics(train), evaluation=_topics(test))


def nq_open_topics(way: DataFiles, train: Content, dev: Content) -> SplitRows:
    """Return NQ-open's rows, those to train with from a file of topics.

    Args:
        way: the way.
        train: the topics to train with.
        dev: the official development rows.
    """
    return SplitRows(train=_topics(train), evaluation=_nq_open(dev))


def nq_open(way: DataFiles, train: Content, dev: Content) -> SplitRows:
    """Return NQ-open's rows.

    Args:
        way: the way.
        train: the official training rows.
        dev: the official development rows.
    """
    return SplitRows(train=_nq_open(train), evaluation=_nq_open(dev))


def squad(way: DataFiles, train: Content, dev: Content) -> SplitRows:
    """Return SQuAD's rows.

    Args:
        way: the way.
        train: the official training set.
        dev: the official development set.
    """
    learned, scored = (
        [row for article in _articles(content) for row in article]
        for content in (train, dev)
    )
    return SplitRows(train=learned, evaluation=scored)


def xquad(way: DataFiles, content: Content) -> SplitRows:
    """Return XQuAD's rows; those of every fifth article are scored.

    Args:
        way: the way.
        content: XQuAD's English file.
    """
    articles = _articles(content)
    return SplitRows(
        train=[row for i, article in enumerate(articles) if i % 5 for row in article],
        evaluation=[row for article in articles[::5] for row in article],
    )


def gsm8k(way: DataFiles, train: Content, test: Content) -> SplitRows:
    """Return GSM8K's rows.

    Args:
        way: the way.
        train: the official training rows.
        test: the official test rows.
    """
    learned, scored = (
        [gsm8k_row(row) for row in json_lines(content.text, str(content.path))]
        for content in (train, test)
    )
    return SplitRows(train=learned, evaluation=scored)


def nq_open_row(row: dict[str, Any]) -> RowDict:
    """Return a row of NQ-open as its authors' files and the hub have it."""
    return {"question": row["question"], "accepted": list(row["answer"])}


def triviaqa_row(row: dict[str, Any]) -> RowDict:
    """Return a row of TriviaQA as the hub has it; all its aliases are accepted."""
    its = row["answer"]
    forms = [its["value"], *its["aliases"], *its["normalized_aliases"]]
    return {"question": row["question"], "accepted": list(dict.fromkeys(forms))}


def squad_row(row: dict[str, Any]) -> RowDict:
    """Return a row of SQuAD as the hub has it."""
    return {
        "context": row["context"],
        "question": row["question"],
        "accepted": list(row["answers"]["text"]),
    }


def gsm8k_row(row: dict[str, Any]) -> RowDict:
    """Return a row of GSM8K as its authors' files and the hub have it."""
    if final_number(row["answer"]) is None:
        raise ValueError(
            f"a solution of GSM8K has no number after `#### `: {row['answer'][-60:]!r}"
        )
    return {"question": row["question"], "accepted": [row["answer"]]}


def _topics(content: Content) -> list[RowDict]:
    found = topic_rows(content.text, str(content.path))
    return [{"question": text, "accepted": answers} for text, answers in found]


def _nq_open(content: Content) -> list[RowDict]:
    return [nq_open_row(row) for row in json_lines(content.text, str(content.path))]


def _articles(content: Content) -> list[list[RowDict]]:
    return [
        [
            {
                "context": paragraph["context"],
                "question": row["question"],
                "accepted": [answer["text"] for answer in row["answers"]],
            }
            for paragraph in article["paragraphs"]
            for row in paragraph["qas"]
        ]
        for article in json.loads(content.text)["data"]
    ]
