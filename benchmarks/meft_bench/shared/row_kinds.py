"""The kinds of tasks that a user's rows can be, with the fields and metrics of each.

classification       text, text_pair, label      label is one of a few classes
regression           text, text_pair, label      label is a number
options              prompt, answer, options     the answer is one of the options
generation           prompt, answer              the answer is written
language-modelling   text                        every token is predicted
"""

from dataclasses import dataclass

SHARE = 0.2
"""Share of the rows that is scored where a sweep names one file and nothing else."""
MAX_NEW_TOKENS = 32
"""Number of tokens that are generated at most where a sweep names no other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowKind:
    """One kind of task."""

    fields: tuple[str, ...]
    """Fields that name columns which must exist."""
    optional: tuple[str, ...] = ()
    """Fields that name columns and may be left out."""
    metrics: tuple[str, ...] = ()
    """Metrics of the suite; the first is used where a sweep names none."""
    has_own_metrics: bool = True
    """Whether a metric of the user can score it."""


KINDS = {
    "options": RowKind(
        fields=("prompt", "answer", "options"),
        metrics=("options_per_character", "options"),
    ),
    "generation": RowKind(
        fields=("prompt", "answer"), metrics=("squad", "nq_open", "trivia_qa", "gsm8k")
    ),
    "classification": RowKind(
        fields=("text", "label"),
        optional=("text_pair",),
        metrics=("accuracy", "accuracy_and_f1", "matthews_correlation"),
    ),
    "regression": RowKind(
        fields=("text", "label"),
        optional=("text_pair",),
        metrics=("pearson_and_spearman",),
    ),
    "language-modelling": RowKind(
        fields=("text",),
        metrics=("log_likelihood_per_token",),
        has_own_metrics=False,
    ),
}
"""By name; of those whose columns a file has, the first is taken where none is named.

Rows of numbers cannot be told from rows of classes: regression is always named.
"""
COLUMN_FIELDS = ("text", "text_pair", "label", "prompt", "answer", "options")
"""Fields that name columns, of any kind."""
TAB_SUFFIXES = (".tsv", ".tab")
"""Ends of names of CSV files whose columns are separated by tabs, not by commas."""
FORMATS = ("csv", "jsonl", "parquet", "dataset")
"""Beginnings of the places of rows: `csv:FILE`, ..., and `dataset:DIR`."""
