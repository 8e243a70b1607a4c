"""The records that `fit` writes: the answer of a search, for which no cell has run.

Where not even the smallest value fits, the record has the status `oom`. That is an
answer too, and no failure of a run.
"""

import re
from collections.abc import Iterable

LONGEST = "fit-seq_len"
"""What the records of a search for the longest sequence call it."""
FIELDS = {LONGEST: "seq_len", "fit-batch_size": "batch_size"}
"""The field whose largest value each search has found, by what its records call it."""
SEARCHES = tuple(FIELDS)
"""What the records of all searches call them."""


def search_of(sweep: str, caveats: str | None) -> str:
    """Return what identifies the search of a record; "" if it is of none.

    Args:
        sweep: the sweep of the record.
        caveats: its caveats, which state the options of a search.
    """
    return f"{sweep}: {caveats or ''}" if sweep in SEARCHES else ""


def options_in_words(caveats: Iterable[str]) -> dict[str, str]:
    """Return what distinguishes the options of several searches, by their caveats.

    The caveats of a search state its options in clauses. Those that all searches share
    are left out, so that the options of a single search are an empty text.

    Args:
        caveats: the caveats of the searches.
    """
    clauses = {text: re.split(r"[,;.] ?", text) for text in dict.fromkeys(caveats)}
    common = set.intersection(*map(set, clauses.values())) if clauses else set()
    return {
        text: ", ".join(clause for clause in its if clause and clause not in common)
        for text, its in clauses.items()
    }


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
