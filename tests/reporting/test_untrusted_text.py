"""Whatever text a record holds, every output can be made and holds it as text."""

import csv
import html.parser
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib.text
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from marks import slow_but_for
from meft_bench.parent import show
from meft_bench.shared.record import Record as HarnessRecord
from meft_reports import methods
from meft_reports.check import check
from meft_reports.frame import to_frame
from meft_reports.frame_files import save_frame
from meft_reports.page import render_page
from meft_reports.plots import PLOTS, find_plot
from meft_reports.plots.canvas import render
from meft_reports.table_formats.markdown import to_markdown
from meft_reports.tables import find_tables
from meft_reports.text import MAX_LENGTH, SHORT_LENGTH, printable, short
from meft_reports.threshold import parse_threshold
from reporting.conftest import (
    build_all,
    build_depth,
    build_quality,
    build_record,
    build_traffic,
)
from reporting.kinds import MakeRecord, Record
from reporting.pages import column, data_of

NASTY = (
    "$",
    "$x$",
    r"$\frac{1}{0}$ \$ \alpha",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)> & &amp; \" ' `",
    "]]> --> <!-- <?xml",
    "{{ 7 * 7 }} {% raw %}",
    "| a | b |\n| - | - |",
    "[x](javascript:alert(1)) ![y](http://example.com/z.png)",
    '=HYPERLINK("http://example.com")',
    "_starts_like_a_hidden_label",
    "a\r\nb\tc\x00\x07\x1b[31m",
    "\u202e\u2066reversed\u200e",
    "\ud800\udfff\ufffe",
    "漢字 😀 עברית",
    "   ",
    "x" * 5000,
)
TEXTS = st.one_of(
    st.sampled_from(NASTY),
    st.text(max_size=60),
    st.text(st.characters(categories=("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))),
)
CHANGED = {
    "": ("cell_id", "sweep", "message"),
    "cell": (
        *("method", "backbone", "dtype", "weights_dtype", "device", "optimizer"),
        *("attention", "blocks"),
    ),
    "measurement": ("score_name", "second_score_name"),
    "environment": (
        *("commit", "code_sha256", "machine", "platform", "cpu", "device_name"),
        *("prediction", "weights_origin", "weights_sha256", "data_origin"),
    ),
}
"""Every field of text, by its section, that means nothing but itself."""


def _with_text(record: Record, text: str) -> Record:
    """The record with `text` behind every text in it, and where there was none.

    Between slashes, so that no text becomes another method's name.
    """
    text = f"/{text}/"
    record = {n: dict(v) if isinstance(v, dict) else v for n, v in record.items()}
    for section, names in CHANGED.items():
        place = record[section] if section else record
        for name in names:
            place[name] = f"{place[name] or ''}{text}"
    if not record["cell"]["task"].startswith("synthetic"):
        record["cell"]["task"] += text
    if record["cell"]["reference"]:
        record["cell"]["reference"] += text
    versions = record["environment"]["versions"]
    record["environment"]["versions"] = {n: v + text for n, v in versions.items()}
    record["environment"]["versions"]["package" + text] = text
    return record


@pytest.fixture(autouse=True, scope="module")
def _known_methods() -> Iterator[None]:
    """A method whose name goes on with a text is described as the method itself, so
    that figures and tables of its kind are made of it, too."""
    plain = methods._method

    def described(name: str) -> methods.Method:
        known = [known for known in methods.TABLE if name.startswith(known)]
        return plain(max(known, key=len, default=name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "_method", described)
        yield


def _records() -> list[Record]:
    """A few of several kinds, of which half of the figures and tables can be made."""
    depth, quality = build_depth(), build_quality()
    failed = [build_record(status) for status in ("oom", "error")]
    records = [*depth[:4], depth[-1], *quality[:4], build_traffic()[1], *failed]
    for place, record in enumerate(records):
        record["cell_id"] = f"{place}/"
    return records


def _frame(text: str) -> pd.DataFrame:
    return to_frame([_with_text(record, text) for record in _records()])


TAGS = frozenset(
    "a body button caption code dd details dialog div dl dt figcaption figure footer "
    "h1 h2 h3 head header html img li main meta nav noscript p script section span "
    "style summary table tbody td th thead title tr ul b".split()
)
"""Every tag of our pages."""


class _Tags(html.parser.HTMLParser):
    """Counts the tags of a page, each with the names of its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag, tuple(name for name, _ in attrs)] += 1


def _tags(text: str) -> "Counter[Any]":
    parser = _Tags()
    parser.feed(text)
    return parser.counts


def _page(text: str) -> str:
    """The page, of which only what holds for any text has been checked."""
    page = render_page(_frame(text)).decode()
    assert not re.search("[\u202a-\u202e\u2066-\u2069\ufffe]", page)
    tags = _tags(page)
    assert {tag for tag, _ in tags} <= TAGS
    data = data_of(page)
    for name in ("cell_id", "message", "method"):
        for shown in column(data["cells"], name):
            assert shown is None or shown.isprintable()
    assert len(page) < 5_000_000
    return page


def test_a_page_shows_any_text_as_text() -> None:
    """All that is nasty at once."""
    page = _page("".join(NASTY))
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    assert "{{ 7 * 7 }}" in page


@pytest.fixture(scope="module")
def plain_tags() -> "Counter[Any]":
    """The tags of the page of the same records with ordinary texts."""
    return _tags(_page("-plain"))


@pytest.mark.slow
@settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(text=TEXTS)
def test_no_text_adds_a_tag(plain_tags: "Counter[Any]", text: str) -> None:
    """The page is made of the same parts, whatever they say."""
    assert _tags(_page(text)) == plain_tags


@pytest.mark.parametrize(
    "name", slow_but_for(PLOTS, "score_lost_bits", "reconstruction", "step_ratio")
)
def test_no_text_of_a_figure_is_a_formula(name: str) -> None:
    """Neither names nor the labels of a scale are ever parsed, and all are bounded."""
    text = "$x$ $\\frac{1}{0}$" + "y" * 1000
    records = [_with_text(record, text) for record in build_all()]
    for record, plain in zip(records, build_all(), strict=True):
        # One method is what others relate to, and has to keep its name; some figures
        # have certain methods, tasks and devices only.
        if plain["cell"]["method"] == "full":
            record["cell"]["method"] = "full"
        if name in ("headline", "savings"):
            kept = ("method", "task", "device", "reference")
            record["cell"] |= {field: plain["cell"][field] for field in kept}
        if name == "longest":
            record["sweep"] = plain["sweep"]
    figure = find_plot(name).draw(to_frame(records))
    render(figure, "svg")
    texts = figure.findobj(matplotlib.text.Text)
    assert texts
    for found in texts:
        assert not found.get_parse_math()
        lines = found.get_text().split("\n")
        assert max(map(len, lines)) <= 150


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
@example(text="".join(NASTY))
def test_tables_show_any_text_as_text(tmp_path_factory: Any, text: str) -> None:
    """As Markdown without a column or a row more."""
    frame = _frame(text)
    for name in ("results", "failures", "environment", "origins"):
        tables = find_tables(name)(frame)
        assert tables
        for table in tables:
            lines = to_markdown([table]).split("\n")
            assert lines[0].startswith("### ")
            body = [line for line in lines if line.startswith("|")]
            assert len(body) == len(table.rows) + 2
            for line in body:
                columns = re.findall(r"(?<!\\)(?:\\\\)*\|", line)
                assert len(columns) == len(table.header) + 1
            escaped = re.sub(r"\\.", "", to_markdown([table]))
            assert not set("<>[]!$&") & set(escaped)
    folder = tmp_path_factory.mktemp("frames")
    for name in ("cells.csv", "cells.parquet"):
        save_frame(frame, folder / name)
    with (folder / "cells.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len(rows) == len(frame) + 1
    for field in (field for row in rows for field in row):
        assert not field.startswith(("=", "+", "@", "\t", "\r")), field
        assert not re.match(r"-\D", field), field


@settings(max_examples=10, deadline=None)
@given(text=TEXTS)
def test_a_finding_is_made_of_printable_lines(text: str) -> None:
    """Nothing of a record moves the cursor or begins a line of its own."""
    before = to_frame([build_record()])
    record = _with_text(build_record(), text)
    record["cell_id"] = build_record()["cell_id"]
    record["cell"] = build_record()["cell"]
    for status in ("ok", "error"):
        after = to_frame([record | {"status": status}])
        output = str(check(after, before, [parse_threshold("score:0")]))
        for line in output.split("\n"):
            assert line.isprintable()
            assert re.match("  |failed: |regression: |not |new: |note: |1 cells", line)


def _shown(record: Record) -> list[tuple[str, str]]:
    return list(show.describe(HarnessRecord.from_json(record)))


@settings(max_examples=20, deadline=None)
@given(text=TEXTS)
def test_show_is_made_of_printable_lines(text: str) -> None:
    """Of the harness's own view of a record too; it can be encoded and is bounded."""
    for name, value in _shown(_with_text(build_record("error"), text)):
        assert f"{name}{value}".isprintable()
        assert len(value) < 20 * MAX_LENGTH
        value.encode()


@given(text=TEXTS)
def test_printable_text_stays_what_it_is(text: str) -> None:
    """And any other becomes printable, and no longer than is allowed, with a mark."""
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown or len(shown) > MAX_LENGTH
    assert (shown == text) == (text.isprintable() and len(text) <= MAX_LENGTH)
    assert len(shown) <= 10 * MAX_LENGTH + 60
    assert ("more characters" in shown) == (len(text) > MAX_LENGTH)
    assert len(short(text)) <= SHORT_LENGTH
    assert (short(text) == text) == (len(text) <= SHORT_LENGTH)


@pytest.mark.parametrize("cut", [printable, short])
def test_texts_that_begin_alike_remain_two(cut: Callable[[str], str]) -> None:
    """What is left out is in the digest."""
    one, other = "x" * 5000 + "1", "x" * 5000 + "2"
    assert cut(one) != cut(other)
    assert cut(one) == cut(one)


def test_a_figure_is_drawn_in_any_script() -> None:
    """A letter that the font lacks is a box and no warning, which would be an error."""
    figure = find_plot("score_memory").draw(_frame("漢字"))
    assert render(figure, "svg").startswith(b"<?xml")
    assert io.BytesIO(render(figure, "png")).read(4) == b"\x89PNG"


def test_a_log_keeps_its_lines_and_nothing_else(make_record: MakeRecord) -> None:
    """Each line is bounded and printable; only the last ones are kept."""
    record = make_record() | {"log_tail": "a\x1b[31m\nb\u202e" + "\n" * 30 + "x" * 5000}
    (text,) = to_frame([record])["log_tail"]
    lines = text.split("\n")
    assert len(lines) == 20
    assert lines[-1].startswith("xxx")
    assert len(lines[-1]) < 1100
    record |= {"log_tail": "a\x1b[31m\nb\u202e"}
    assert list(to_frame([record])["log_tail"]) == ["a\\x1b[31m\nb\\u202e"]
