"""Files of topics in Anserini's format: a question and its accepted answers per line.

The columns are separated by a tab and may be in double quotes; the answers are a Python
list of strings.
"""

import ast

from meft_bench.child.tasks.files import table


def rows(text: str, name: str) -> list[tuple[str, list[str]]]:
    """Return the questions of a file, each with its accepted answers.

    Args:
        text: contents of the file.
        name: name of the file, for the message.

    Raises:
        ValueError: a line is not of this form.
    """
    found = table(text, name, ("question", "answers"), is_quoted=True)
    return [(row["question"], _answers(row["answers"], name)) for row in found]


def _answers(text: str, name: str) -> list[str]:
    try:
        answers = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        answers = None
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise ValueError(f"{name}: expected a list of strings, got {text:.80}")
    return answers
