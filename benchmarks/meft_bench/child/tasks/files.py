"""Data files of tasks: their location, and their rows.

    find        a file, plain or as .gz
    content_of  its bytes
    decode      its text
    json_lines  one JSON value per line
    table       tab-separated columns, with or without quoting

Any valid file is read correctly, with any line separators (LF, CRLF or CR), with or
without a byte-order mark, blank lines and a final newline. Characters such as U+2028
and U+0085, at which `str.splitlines` splits as well, are text.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def find(folder: Path, name: str) -> Path | None:
    """Return the file `name` or `name`.gz in `folder`; None if there is neither."""
    candidates = (folder / name, folder / f"{name}.gz")
    return next((file for file in candidates if file.is_file()), None)


def content_of(file: Path) -> bytes:
    """Return the content of a file, decompressed if its name ends in .gz.

    Raises:
        ValueError: the file is damaged.
    """
    content = file.read_bytes()
    if file.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a whole gzip file: {error}") from error


def decode(content: bytes, file: Path) -> str:
    """Return the text of a file without byte-order mark.

    Args:
        content: the content of the file.
        file: its path, for the message.

    Raises:
        ValueError: the file is not text in UTF-8, or in UTF-16 with a byte-order mark.
    """
    encoding = "utf-16" if content.startswith(UTF_16) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8: {error}") from error


def json_lines(text: str, name: str) -> list[Any]:
    """Return the values of a file in the format JSON Lines.

    Args:
        text: contents of the file.
        name: name of the file, for the message.

    Raises:
        ValueError: a line is not JSON; the message names it.
    """
    values = []
    # No JSON string contains a bare CR or LF, so either ends a line.
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        if not line.strip(" \t"):
            continue
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: not JSON ({error})") from error
    return values


def table(
    text: str,
    name: str,
    columns: Sequence[str] | None,
    *,
    is_quoted: bool,
    leave_out_broken: bool = False,
) -> list[dict[str, str]]:
    """Return the rows of a file of tab-separated columns.

    Args:
        text: contents of the file.
        name: name of the file, for the message.
        columns: names of the columns; None reads them from the first line.
        is_quoted: whether a cell may be in double quotes, and then contain tabs,
            newlines and doubled quotes, as defined by `csv.excel_tab`. Otherwise quotes
            are text.
        leave_out_broken: whether rows with too few or too many columns are left out.

    Raises:
        ValueError: a row has too few or too many columns and is not left out, or quotes
            do not match; the message names the line.
    """
    rows = _quoted(text, name) if is_quoted else _unquoted(text)
    names = columns
    found = []
    for number, cells in rows:
        if names is None:
            names = cells
            if len(set(names)) < len(names):
                raise ValueError(
                    f"{name}, line {number}: a column name occurs twice in "
                    f"{', '.join(names)}"
                )
            continue
        if len(cells) != len(names) and leave_out_broken:
            continue
        if len(cells) != len(names):
            raise ValueError(
                f"{name}, line {number}: {len(cells)} columns, expected {len(names)} "
                f"({', '.join(names)})"
            )
        found.append(dict(zip(names, cells, strict=True)))
    return found


def _quoted(text: str, name: str) -> list[tuple[int, list[str]]]:
    # Without `newline=""`, line separators inside quotes would be changed.
    reader = csv.reader(io.StringIO(text, newline=""), csv.excel_tab, strict=True)
    try:
        return [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}") from error


def _unquoted(text: str) -> list[tuple[int, list[str]]]:
    # `csv` rejects a CR inside a line, which is text where lines end in LF.
    ends = "\r?\n" if "\n" in text else "\r"
    lines = enumerate(re.split(ends, text), start=1)
    return [(number, line.split("\t")) for number, line in lines if line]
