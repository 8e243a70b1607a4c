"""Tables in files: Markdown, LaTeX, CSV, Parquet, JSON."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meft_reports.cli import main
from meft_reports.format import (
    ShownNumber,
    format_bytes,
    format_count,
    format_difference,
    format_error,
    format_mean,
    format_part,
    format_score,
    format_seconds,
    with_words,
)
from meft_reports.longest import words_of
from meft_reports.table_formats import FORMATS
from meft_reports.table_formats.latex import SYMBOLS, escaped
from meft_reports.table_formats.one_table import columns_of
from meft_reports.tables.table import Heading, Table
from reporting.kinds import MakeRecord, Record, Write


def named(*names: str) -> tuple[Heading, ...]:
    """Return columns with these names."""
    return tuple(Heading(name, f"What {name} means.") for name in names)


SPECIAL = "\\ _ % & # $ { } ~ ^ < > | ` \" [ ] * -- ''"
TABLES = (
    Table(
        title=f"One · {SPECIAL}",
        columns=named("method", "error", "error"),
        rows=(("full", "+0.5 %", "–"), ("=1+1", "-0.1 to +0.3", "")),  # noqa: RUF001
        notes=("Of `a_b`, 100 %.", "Again."),
    ),
    Table(
        title="Two",
        columns=named("method", "kind", "n"),
        rows=(),
        num_text_columns=2,
    ),
    Table(
        title="Three",
        columns=named("kind", "error"),
        rows=(("a|b\\", "oom"),),
        num_text_columns=1,
    ),
)
"""Tables with other headers, one without a row."""
PRINTED = {
    "textbackslash": "\\",
    "textasciitilde": "~",
    "textasciicircum": "^",
    "textless": "<",
    "textgreater": ">",
    "textbar": "|",
    "textasciigrave": "`",
    "textquotedblright": '"',
}
"""Characters that commands of LaTeX without an argument print."""


def printed(source: str) -> str:
    """The text that LaTeX prints of the content of a cell.

    It fails for a character with a meaning that is not escaped.
    """
    for symbol, command in SYMBOLS.items():
        source = source.replace(command, symbol)
    return "".join(_printed(source))


def _printed(source: str) -> Iterator[str]:
    token = re.compile(
        r"\\([a-z]+)\{\}|\\([&%$#_{}])|\{([\[\]*])\}|(\{\})|([^\\&%$#_{}~^<>|`\"\[\]*])"
    )
    place = 0
    for found in token.finditer(source):
        assert found.start() == place, source[place:]
        command, special, held, _, plain = found.groups()
        yield PRINTED[command] if command else special or held or plain or ""
        place = found.end()
    assert place == len(source), source[place:]


def test_latex_has_the_rules_of_booktabs_and_aligned_numbers() -> None:
    source = FORMATS[".tex"](TABLES).decode()
    assert source.count(r"\begin{table}[htbp]") == source.count(r"\end{table}") == 3
    assert re.findall(r"\\begin\{tabular\}\{(\w+)\}", source) == ["lrr", "llr", "lr"]
    for rule in ("toprule", "midrule", "bottomrule"):
        assert source.count(f"\\{rule}") == 3
    assert "\nfull & +0.5 \\% & \\textendash{} \\\\\n" in source
    assert r"{\footnotesize Of \texttt{a\_b}, 100 \%.\par}" in source


def test_latex_places_many_tables() -> None:
    """LaTeX has an error for more tables than it can hold before it places them."""
    for count, num_breaks in ((18, 0), (19, 1), (40, 2)):
        source = FORMATS[".tex"](TABLES[:1] * count).decode()
        assert source.count("\\clearpage") == num_breaks


def test_every_row_of_latex_has_as_many_cells_as_the_header() -> None:
    r"""A `&` or `\\` of a text is no separator."""
    rows = ((r"x & y \\ z", r"\end{table}"),)
    table = Table(title="t", columns=named("a", "b"), rows=rows)
    source = FORMATS[".tex"]([table]).decode()
    (row,) = [line for line in source.splitlines() if line.startswith("x ")]
    first, second = row.removesuffix(r" \\").split(" & ")
    assert printed(first) == r"x & y \\ z"
    assert printed(second) == r"\end{table}"


@example(SPECIAL)
@example("".join(SYMBOLS))
@given(st.text(st.characters(categories=("L", "N", "P", "S"))))
def test_latex_prints_a_text_as_it_is(text: str) -> None:
    """No character is a command, begins an argument, or joins the next one."""
    source = escaped(text)
    assert printed(source) == text
    assert "--" not in source
    assert "''" not in source


def test_rows_of_all_tables_are_one_table() -> None:
    """With the title and the notes of their table; a dash is null."""
    assert columns_of(TABLES) == {
        "table": [TABLES[0].title, TABLES[0].title, "Three"],
        "method": ["full", "=1+1", None],
        "error": ["+0.5 %", "-0.1 to +0.3", "oom"],
        "error (2)": [None, "", None],
        "kind": [None, None, "a|b\\"],
        "n": [None, None, None],
        "notes": ["Of `a_b`, 100 %. Again."] * 2 + [None],
    }


def test_csv_and_parquet_have_these_rows(tmp_path: Path) -> None:
    """In CSV, null is empty and no text is a formula, but signed numbers stay."""
    columns = columns_of(TABLES)
    (tmp_path / "a.parquet").write_bytes(FORMATS[".parquet"](TABLES))
    frame = pd.read_parquet(tmp_path / "a.parquet").astype(object)
    found = {name: frame[name].where(frame[name].notna(), None) for name in frame}
    assert {name: [*values] for name, values in found.items()} == columns
    header, *rows = csv.reader(FORMATS[".csv"](TABLES).decode().splitlines())
    assert header == [*columns]
    assert rows[1][1:4] == ["'=1+1", "-0.1 to +0.3", ""]
    assert rows[0][2:4] == ["+0.5 %", ""]


def test_json_has_every_table() -> None:
    value = json.loads(FORMATS[".json"](TABLES))
    assert value["schema"] == "meft-tables/1"
    assert [table["title"] for table in value["tables"]] == [t.title for t in TABLES]
    first = value["tables"][0]
    assert first["header"] == ["method", "error", "error"]
    assert first["num_text_columns"] == 1
    assert first["rows"] == [["full", "+0.5 %", None], ["=1+1", "-0.1 to +0.3", ""]]
    assert first["notes"] == [*TABLES[0].notes]


@pytest.mark.parametrize("ending", FORMATS)
def test_the_ending_chooses_the_format(
    ending: str, matrix: list[Record], write: Write, tmp_path: Path
) -> None:
    """Of one table and of several; the same records give the same bytes."""
    run = str(write(matrix))
    for name, num_tables in (("results", 1), ("memory", 2)):
        files = [tmp_path / f"{name}{number}{ending}" for number in (0, 1)]
        for file in files:
            assert main(["table", name, run, "-o", str(file)]) == 0
        assert files[0].read_bytes() == files[1].read_bytes()
        if ending == ".json":
            assert len(json.loads(files[0].read_bytes())["tables"]) >= num_tables


def test_markdown_in_a_file_is_that_of_the_terminal(
    matrix: list[Record],
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = str(write(matrix)), tmp_path / "a.md"
    assert main(["table", "memory", run]) == 0
    shown = capsys.readouterr().out
    assert main(["table", "memory", run, "-o", str(out)]) == 0
    assert out.read_text() == shown.removesuffix("\n")


def test_no_file_is_written_without_a_table(
    make_record: MakeRecord,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is an error there, as it is of a figure."""
    run, out = write([make_record(task="synthetic")]), tmp_path / "a.csv"
    assert main(["table", "results", str(run), "-o", str(out)]) == 2
    errors = capsys.readouterr().err
    assert "No table: `results` needs cells of a task" in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_parquet_has_numbers_next_to_texts_with_units_and_meanings() -> None:
    """A word instead of a number is null there, and a bound is not the number."""
    table = Table(
        title="t",
        columns=named("method", "peak", "score", "longest"),
        rows=(
            ("a", format_bytes(1536), format_mean(0.5, 0.25), format_count(7)),
            ("b", "oom", format_difference(0.25), at_least(9)),
            ("c", with_words(format_bytes(2), ["oom"]), "", format_part(2, 3)),
        ),
    )
    file = pq.read_table(io.BytesIO(FORMATS[".parquet"]([table])))
    assert file.to_pydict() == {
        "table": ["t"] * 3,
        "method": ["a", "b", "c"],
        "peak": [1536.0, None, 2.0],
        "peak, as shown": ["1.5 KiB", "oom", "2 B, oom"],
        "score": [0.5, 0.25, None],
        "score (spread)": [0.25, None, None],
        "score, as shown": ["0.500 ± 0.250", "+0.250", ""],
        "longest": [7, None, 2],
        "longest (at least)": [None, 9, None],
        "longest (of)": [None, None, 3],
        "longest, as shown": ["7", "≥ 9", "2 of 3"],
        "notes": [None] * 3,
    }
    metadata = {field.name: field.metadata for field in file.schema}
    assert metadata["peak"] == {b"unit": b"bytes", b"meaning": b"What peak means."}
    spread = metadata["score (spread)"]
    assert spread == {b"meaning": b"spread of this: What score means."}
    assert metadata["longest (at least)"][b"unit"] == b"count"
    assert all(held and held[b"meaning"] for held in metadata.values())


def test_numbers_of_two_units_are_two_columns_of_parquet() -> None:
    """As those of tables of bytes and of seconds with the same columns."""
    columns = named("method", "batch 1")
    tables = [
        Table(title="memory", columns=columns, rows=(("a", format_bytes(8)),)),
        Table(title="time", columns=columns, rows=(("a", format_seconds(2)),)),
    ]
    file = pq.read_table(io.BytesIO(FORMATS[".parquet"](tables))).to_pydict()
    assert file["batch 1 [bytes]"] == [8.0, None]
    assert file["batch 1 [seconds]"] == [None, 2.0]
    assert file["batch 1, as shown"] == ["8 B", "2 s"]


def test_json_has_the_numbers_and_the_meanings() -> None:
    table = Table(
        title="t",
        columns=named("method", "score"),
        rows=(("a", format_mean(0.5, 0.25)), ("b", "oom")),
    )
    (found,) = json.loads(FORMATS[".json"]([table]))["tables"]
    assert found["columns"][1] == {"name": "score", "meaning": "What score means."}
    number = {"unit": "", "value": 0.5, "spread": 0.25}
    assert found["numbers"] == [[None, number], [None, None]]


@pytest.mark.parametrize("value", [None, float("nan"), 0.0, 0.3, 1023.97, 1e12])
def test_a_shown_number_is_the_number(value: float | None) -> None:
    """Whatever it is formatted as; null is a dash without a number."""
    for form in (format_bytes, format_seconds, format_score, format_error):
        shown = form(value)
        if value is None or math.isnan(value):
            assert not isinstance(shown, ShownNumber)
        else:
            assert isinstance(shown, ShownNumber)
            assert shown.values == {"": value}


def at_least(value: int) -> str:
    """Return a lower bound as the tables show it."""
    return words_of(pd.Series({"seq_len": value, "is_at_least": True}))
