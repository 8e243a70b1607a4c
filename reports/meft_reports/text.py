"""Make text of records displayable: printable, and of bounded length.

A record can hold any text. The results of this module can be written in any encoding,
do not move a terminal's cursor or change the direction of text, and fit on a page. The
outputs escape it for their own format: HTML, Markdown, CSV, SVG.
"""

import hashlib

MAX_LENGTH = 1000
"""Maximum number of characters of one text that the frame keeps."""
MAX_LINES = 20
"""Maximum number of lines of a text that keeps its line breaks."""
SHORT_LENGTH = 48
"""Maximum number of characters of one name that fit into a figure."""


def printable(text: str, max_length: int = MAX_LENGTH) -> str:
    r"""Return `text` with its unprintable characters escaped, cut if it is too long.

    Control characters, line breaks, bidirectional marks and lone surrogates become
    escapes as Python writes them, `\n` or `\u202e`. A text that is cut ends in a mark
    with the number of characters left out and a digest of the whole text, so that two
    long texts with the same beginning remain distinct.
    """
    if len(text) <= max_length and text.isprintable():
        return text
    shown = "".join(map(_escaped, text[:max_length]))
    if len(text) <= max_length:
        return shown
    num_left_out = len(text) - max_length
    return f"{shown}… [{num_left_out:,} more characters, {_digest(text)}]"


def printable_lines(text: str) -> str:
    """Return a text of several lines, each as `printable` returns it.

    The last `MAX_LINES` are kept.
    """
    return "\n".join(map(printable, text.split("\n")[-MAX_LINES:]))


def short(text: str, max_length: int = SHORT_LENGTH) -> str:
    """Return `text`; if it is too long for a figure, its beginning and its digest."""
    if len(text) <= max_length:
        return text
    digest = _digest(text)
    return f"{text[: max_length - len(digest) - 1]}…{digest}"


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: `1 cell`, `2 cells`, `1,120 cells`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
