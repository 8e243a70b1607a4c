"""GSM8K's official rule: the final number of a solution, as text."""

import re

FINAL_NUMBER = re.compile(r"#### (-?[0-9.,]+)")


def final_number(text: str) -> str | None:
    """Return the number after the first `#### ` without its commas; None without one.

    It is compared as text, as in OpenAI's grade_school_math/dataset.py.
    """
    found = FINAL_NUMBER.search(text)
    return found[1].replace(",", "") if found else None
