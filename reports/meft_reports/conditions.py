"""The facts in which two records must agree for a number of theirs to be compared.

    times, and the whole GPU     the machine, and what else ran on it
    scores                       the metric, the rows and the weights
    the process's host memory    whether it was forked from one with all imports done
    other numbers                none: bytes and predicted times are exact

`compare` and `history` use them. `check` has lists of its own, which are longer, as its
verdict must hold without a reader.
"""

from meft_reports.columns import SCORE_NAMES
from meft_reports.columns.column import Column
from meft_reports.columns.environment import FOR_SCORES
from meft_reports.columns.measurement import current_score_name
from meft_reports.format import format_fact
from meft_reports.valid_records import Record

FOR_SECONDS = ("machine", "num_threads", "num_slots", "device_name")
FOR_HOST_MEMORY = ("is_forked",)
HOST_MEMORY = "peak_host_bytes"
ROWS = ("num_train_rows", "num_eval_rows")

Facts = dict[str, str]
"""Texts by the name of the fact."""


def facts_of(record: Record, column: Column) -> Facts:
    """Return the facts that a number of a record depends on.

    Args:
        record: a record.
        column: the column of the number.
    """
    its, seen = record["environment"], record["measurement"]
    if column.is_measured_time or column.is_shared:
        return {name: format_fact(its.get(name)) for name in FOR_SECONDS}
    if column.name == HOST_MEMORY:
        return {name: format_fact(bool(its.get(name))) for name in FOR_HOST_MEMORY}
    metric = SCORE_NAMES.get(column.name)
    if metric is None:
        return {}
    name = current_score_name(seen.get(metric), seen.get("loss_mean"))
    facts = {metric: format_fact(name)}
    facts |= {name: format_fact(its.get(name)) for name in FOR_SCORES}
    return facts | {name: format_fact(seen.get(name)) for name in ROWS}


def first_difference(before: Facts, after: Facts) -> tuple[str, str, str] | None:
    """Return the first fact that differs, with both texts; None if all agree.

    Args:
        before: facts of `facts_of`.
        after: those of another record, for the same column.
    """
    for name, text in before.items():
        if text != after[name]:
            return name, text, after[name]
    return None
