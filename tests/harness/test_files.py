"""Files of rows: any valid one gives its rows."""

import codecs
import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.tiny import cell
from meft_bench.child.tasks import files
from meft_bench.child.tasks.formats import topics
from meft_bench.child.tasks.rows import Content
from meft_bench.shared.registry import TASKS, load
from meft_bench.shared.source import Source

ODD = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"""What `str.splitlines` takes for line separators besides LF, CR and CRLF."""
texts = st.text(f"ab\u00fc \"',\t\n\r{{}}{ODD}", max_size=6)
separated = pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
encoded = pytest.mark.parametrize(
    "encode",
    [
        str.encode,
        lambda text: codecs.BOM_UTF8 + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    ],
    ids=["utf-8", "utf-8 with mark", "utf-16", "utf-16-be"],
)


@encoded
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_byte_order_mark_is_no_text(
    encode: object, suffix: str, tmp_path: Path
) -> None:
    """In UTF-8 and UTF-16, plain or compressed."""
    assert callable(encode)
    content = encode("über\n")
    (tmp_path / "some").mkdir()
    file = tmp_path / "some" / f"rows.txt{suffix}"
    file.write_bytes(gzip.compress(content) if suffix else content)
    assert files.find(tmp_path / "some", "rows.txt") == file
    assert Content(file, files.content_of(file)).text == "über\n"


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.txt: expected text in UTF-8"):
        files.decode(b"caf\xe9", tmp_path / "rows.txt")


def test_a_compressed_file_that_is_cut_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt.gz"
    for damaged in (gzip.compress(b"rows" * 9)[:-9], b"rows"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"rows\.txt\.gz: not a whole gzip file"):
            files.content_of(file)


# JSON Lines


@separated
@pytest.mark.parametrize("last", [True, False])
def test_json_lines_are_read_whatever_ends_them(end: str, last: bool) -> None:
    """Blank lines have no value; characters in strings end no line."""
    values = [{"text": f"a{ODD}b"}, [1, 2], "c"]
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    text = end.join([lines[0], "", lines[1], " \t", lines[2]]) + end * last
    assert files.json_lines(text, "rows.jsonl") == values


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.dictionaries(texts, texts | st.integers()), max_size=4),
    st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
    st.booleans(),
)
def test_json_lines_are_the_inverse_of_writing_them(
    values: list[dict[str, str | int]], end: str, is_ascii: bool
) -> None:
    text = "".join(json.dumps(v, ensure_ascii=is_ascii) + end for v in values)
    assert files.json_lines(text, "rows.jsonl") == values


def test_a_line_that_is_not_json_is_named() -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: not JSON"):
        files.json_lines('{"a": 1}\r\n\r\n{"a": ', "rows.jsonl")


# Tab-separated columns


@separated
@pytest.mark.parametrize("last", [True, False])
def test_quotes_are_text_where_a_table_is_unquoted(end: str, last: bool) -> None:
    """As in GLUE's files; blank lines are no rows."""
    text = end.join(["a\tb", f'"so it{ODD}\t1', "", 'and "ends"\t']) + end * last
    assert files.table(text, "rows.tsv", None, is_quoted=False) == [
        {"a": f'"so it{ODD}', "b": "1"},
        {"a": 'and "ends"', "b": ""},
    ]


def test_a_return_within_a_line_is_text() -> None:
    """Where lines end in newlines; before one it belongs to the separator."""
    rows = files.table("one\rtwo\t1\r\nthree\t2\n", "x", ("a", "b"), is_quoted=False)
    assert [row["a"] for row in rows] == ["one\rtwo", "three"]


@separated
def test_a_quoted_cell_holds_tabs_newlines_and_quotes(end: str) -> None:
    text = f'a\tb{end}"one\ttwo{end}{ODD}"\t"say ""no"""{end}{end}three\tfour'
    assert files.table(text, "rows.tsv", None, is_quoted=True) == [
        {"a": f"one\ttwo{end}{ODD}", "b": 'say "no"'},
        {"a": "three", "b": "four"},
    ]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_a_quoted_table_is_the_inverse_of_writing_it(
    rows: list[tuple[str, str]], end: str
) -> None:
    """By the standard library."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, csv.excel_tab, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows(rows)
    found = files.table(file.getvalue(), "rows.tsv", ("a", "b"), is_quoted=True)
    assert [(row["a"], row["b"]) for row in found] == rows


@pytest.mark.parametrize(
    ("text", "is_quoted", "message"),
    [
        ("a\tb\n1\t2\n3\n", False, r"x, line 3: 1 columns, expected 2 \(a, b\)"),
        ("a\tb\n1\t2\t3\n", True, r"x, line 2: 3 columns, expected 2 \(a, b\)"),
        ('a\tb\n1\t"2\n', True, r"x, line 2: unexpected end of data"),
        ('a\tb\n1\t"2"3\n', True, r"x, line 2: .*expected after"),
    ],
)
def test_a_broken_row_is_named(text: str, is_quoted: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        files.table(text, "x", None, is_quoted=is_quoted)


@separated
@encoded
def test_glue_is_read_whatever_wrote_it(
    end: str, encode: object, tmp_path: Path
) -> None:
    """Labels, which stand last in a line, included."""
    assert callable(encode)
    text = end.join(["sentence\tlabel", '"Good\u2028.\t1', "", "Bad.\t0", ""])
    (tmp_path / "SST-2").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "SST-2" / name).write_bytes(encode(text))
    task = load(TASKS["sst2"])(cell(task="sst2"), Source(data_dir=tmp_path))
    assert [(row.texts, row.label) for row in task.evaluation] == [
        (('"Good\u2028.',), 1),
        (("Bad.",), 0),
    ]


def test_broken_rows_are_left_out_where_the_official_loader_does_so() -> None:
    """As for QQP's files; where it does not, they are refused."""
    text = "a\tb\n1\t2\n3\n4\t5\t6\n7\t8\n"
    rows = files.table(text, "x", None, is_quoted=False, leave_out_broken=True)
    assert rows == [{"a": "1", "b": "2"}, {"a": "7", "b": "8"}]


# Topics


@separated
def test_topics_are_quoted_where_they_must_be(end: str) -> None:
    """A list that stands in quotes is the list, not the text of one."""
    text = f"""who?\t['A', "B's"]{end}"say ""yes""?"\t"['C ""D""']"{end}"""
    assert topics.rows(text, "x") == [
        ("who?", ["A", "B's"]),
        ('say "yes"?', ['C "D"']),
    ]


@pytest.mark.parametrize("answers", ["A", "'A'", "[1]", "['A'", "len([])"])
def test_topics_without_a_list_of_answers_are_refused(answers: str) -> None:
    with pytest.raises(ValueError, match=r"x: expected a list of strings, got"):
        topics.rows(f"who?\t{answers}\n", "x")


def test_real_topics_have_no_answer_that_is_cut(data_dir: Path) -> None:
    """TriviaQA's files are quoted in more than a thousand lines."""
    for name in ("topics.dpr.trivia.dev.txt", "topics.dpr.trivia.test.txt"):
        file = files.find(data_dir / "triviaqa", name)
        assert file is not None
        rows = topics.rows(files.content_of(file).decode(), name)
        assert len(rows) == {"dev": 8837, "test": 11313}[name.split(".")[-2]]
        assert all(answer.strip() for _, answers in rows for answer in answers)
