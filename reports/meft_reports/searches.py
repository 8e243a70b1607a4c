"""The records that `fit` writes: the answer of a search, for which no cell has run.

Where not even the smallest value fits, the record has the status `oom`. That is an
answer too, and no failure of a run.
"""

LONGEST = "fit-seq_len"
"""What the records of a search for the longest sequence call it."""
SEARCHES = (LONGEST, "fit-batch_size")
"""What the records of all searches call them."""


NOT_LIMITED = "memory is not the limit: "
"""How the message of an answer starts that memory does not limit."""


def is_at_least(sweep: str, status: str, message: str) -> bool:
    """Return whether a record says that a value fits, and a larger one may too.

    Args:
        sweep: the sweep of the record.
        status: how it ended.
        message: its message.
    """
    is_answer = status == "ok" and sweep in SEARCHES
    return is_answer and message.startswith(NOT_LIMITED)


def found_nothing(sweep: str, status: str) -> bool:
    """Return whether a record says that no value of a search fits.

    Args:
        sweep: the sweep of the record.
        status: how it ended.
    """
    return status == "oom" and sweep in SEARCHES
