import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from markupsafe import escape

from meft_reports.errors import ReportError
from meft_reports.frame import read_frame, to_frame
from meft_reports.page import bundle
from meft_reports.page.figures import FIGURES
from meft_reports.page.figures.figure import Figure
from meft_reports.page.payload import encode, to_bytes
from reporting.conftest import MIB, build_all
from reporting.kinds import Cli, MakeRecord, Record, Write
from reporting.pages import as_text, before_figures, column, data_of, page_of, unpacked


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """The frame of all made-up runs."""
    return to_frame(build_all())


@pytest.fixture(scope="module")
def page(frame: pd.DataFrame) -> str:
    """The page of them."""
    return page_of(frame)


def test_the_page_needs_nothing_else(page: str) -> None:
    """It has no source of its own outside, and forbids the browser to fetch one."""
    top = page.partition('<script type="application/gzip"')[0]
    for source in re.findall(r'(?:src|href)="([^"]*)"', top):
        assert source.startswith("#")
        assert f'id="{source[1:]}"' in page
    assert not re.search(r"<link|@import|url\((?!data:)", top)
    assert "default-src 'none'" in top


def test_the_same_records_give_the_same_page(
    every_kind: list[Record], page: str, write: Write
) -> None:
    """Byte for byte, in whatever order the records were written."""
    assert page_of(read_frame([write(reversed(every_kind))])) == page


def test_every_cell_is_on_the_page(frame: pd.DataFrame, page: str) -> None:
    """With its name, its status, and every number as it is in the frame."""
    cells = data_of(page)["cells"]
    assert column(cells, "cell_id") == frame["cell_id"].tolist()
    assert column(cells, "status") == frame["status"].tolist()
    for name in ("saved_bytes", "score", "step_ratio"):
        expected = [None if pd.isna(value) else value for value in frame[name]]
        assert column(cells, name) == expected


def test_how_cells_ended_is_above_the_figures(frame: pd.DataFrame, page: str) -> None:
    top = as_text(before_figures(page))
    assert f"{len(frame)} cells: " in top
    ran = frame[(frame["sweep"] != "fit-seq_len") | (frame["status"] == "ok")]
    for status, count in ran["status"].value_counts().items():
        assert f"{count} {status}" in top


def test_the_title_is_the_question(make_record: MakeRecord) -> None:
    """The given one, else that of the records, else the name of the sweep."""
    asked = make_record() | {"sweep_question": "What does <b>it</b> cost?"}
    title = "<h1>What does &lt;b&gt;it&lt;/b&gt; cost?</h1>"
    assert title in page_of(to_frame([asked]))
    assert "<h1>Why?</h1>" in page_of(to_frame([asked]), question="Why?")
    assert "<h1>example</h1>" in page_of(to_frame([make_record()]))


def test_predictions_are_announced(make_record: MakeRecord) -> None:
    """Above the first figure, and how they came about."""
    how = "fake CUDA tensors; by rules that were compared with an H200"
    predicted = make_record(device="virtual-H200", prediction=how)
    top = before_figures(page_of(to_frame([predicted])))
    assert "predicted, not measured" in top
    assert how in top
    assert "predicted" not in before_figures(page_of(to_frame([make_record()])))


def test_random_weights_are_announced(make_record: MakeRecord) -> None:
    frame = to_frame([make_record("oom", backbone="random:bert-tiny")])
    assert "Random weights in 1 cell" in before_figures(page_of(frame))


def test_a_run_that_only_failed_has_a_page(make_record: MakeRecord) -> None:
    page = page_of(to_frame([make_record("oom")]))
    assert "1 cell out of memory" in page
    assert column(data_of(page)["settings"], "status") == ["oom"]


def test_a_long_message_costs_nothing(make_record: MakeRecord) -> None:
    """A megabyte of it, of which the beginning is kept."""
    short = page_of(to_frame([make_record("error", message="x")]))
    long = page_of(to_frame([make_record("error", message="x" * 2**20)]))
    assert len(long) - len(short) < 2000


def test_words_that_the_page_fills_in_are_declared(page: str) -> None:
    """A misspelt one in a specification would leave a hole in the figure."""
    script = page.rpartition('<script type="module">')[2]
    text = json.dumps(data_of(page)["figures"])
    words = set(re.findall(r"@(\w+)", text))
    assert {"methods", "colors", "unit", "width"} <= words
    missing = [w for w in words if not re.search(rf"\b{w}\b", script)]
    assert missing == []


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_a_figure_says_what_it_shows(figure: Figure, page: str) -> None:
    """And the script knows how to make its rows."""
    script = page.rpartition('<script type="module">')[2]
    assert figure.about.endswith(".")
    assert f"  {figure.rows}() {{" in script


def test_libraries_are_whole(page: str) -> None:
    assert b"export{" in unpacked(page, "vega")
    assert b"DataTables" in unpacked(page, "datatables")


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder of caches; libraries are read anew, and again after the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = (bundle.vega, bundle.datatables, bundle.datatables_css)
    for function in cached:
        function.cache_clear()
    yield tmp_path
    for function in cached:
        function.cache_clear()


@pytest.mark.slow
def test_a_broken_cache_is_made_again(no_cache: Path) -> None:
    """The bundled library is the same with a cache, without, and with half a one."""
    text = bundle.vega()
    (path,) = (no_cache / "meft").iterdir()
    for content in (text, text[: len(text) // 2], "x"):
        path.write_text(content)
        bundle.vega.cache_clear()
        assert bundle.vega() == text
        assert path.read_text() == text


@pytest.mark.parametrize("package", ["itables", "vl_convert"])
@pytest.mark.usefixtures("no_cache")
def test_a_missing_library_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, frame: pd.DataFrame
) -> None:
    """With the command that installs it, in one line."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ReportError, match=r"pip install 'meft\[page\]'"):
        page_of(frame)


def test_the_command_writes_the_page(
    cli: Cli, write: Write, frame: pd.DataFrame
) -> None:
    runs = write(build_all())
    output = runs.parent / "report.html"
    done = cli("page", runs, "-o", output, "--question", "Which is best?")
    assert done.returncode == 0, done.stderr
    assert output.read_text() == page_of(frame, question="Which is best?")


def test_tables_are_encoded_without_loss() -> None:
    rows: list[dict[str, Any]] = [
        {"a": "x", "b": 1, "c": None, "d": [1.5, float("nan")]},
        {"a": "x", "b": None, "c": None, "d": None},
        {"a": "y", "b": 2**53, "c": None, "d": []},
    ]
    table = json.loads(to_bytes(encode(rows)))
    assert column(table, "a") == ["x", "x", "y"]
    assert column(table, "b") == [1, None, 2**53]
    assert column(table, "c") == [None] * 3
    assert column(table, "d") == [[1.5, None], None, []]


def test_a_breakdown_is_in_the_dialog_and_the_figure(
    make_record: MakeRecord, write: Write, cli: Cli
) -> None:
    row = ["saved", "forward", "encoder.*", "addmm", "float32", [4, 4], 3 * MIB, 2, 7]
    breakdown = {
        "peak_bytes": 4 * MIB,
        "phase": "backward",
        "rows": [row],
        "other_bytes": MIB,
        "saved_rows": [row],
        "saved_other_bytes": 0,
        "saved_bytes": 3 * MIB,
        "at_op": 9,
        "num_ops": 12,
    }
    other = make_record(method="lora")
    same = make_record(seed=1)
    for record in (first := make_record(), same):
        record["memory_breakdown"] = breakdown
    runs = write([first, other, same])
    output = runs.parent / "report.html"
    assert cli("page", runs, "-o", output).returncode == 0
    held = data_of(output.read_text())["breakdowns"]
    assert held == {
        "of": [0, 0, None],
        "kept": [
            {
                "phase": "backward",
                "peak": 4 * MIB,
                "kinds": {"saved": 3 * MIB, "smaller storages": MIB},
                "rows": [row],
                "saved": [row],
            }
        ],
    }


def test_origins_are_on_the_page(page: str, frame: pd.DataFrame) -> None:
    """Machines, weights and data, in plain HTML."""
    for name in ("machine", "weights_origin", "data_origin"):
        for value in frame[name].dropna().unique():
            assert str(escape(value)) in page


def test_numbers_of_others_are_on_the_page(cli: Cli, write: Write) -> None:
    """From a file of checks; fitted ones are told apart."""
    figure = {
        "case": "a run",
        "quantity": "max_memory_allocated",
        "value": 110,
        "measured": 100,
        "source": "somebody",
        "note": "",
        "is_calibration": True,
        "estimates": {},
    }
    line = {"status": "ok", "device_name": "NVIDIA A100", "figures": [figure]}
    runs, checks = write(build_all()[:2]), write([line], "mine.checks.jsonl")
    output = runs.parent / "report.html"
    done = cli("page", runs, checks, "-o", output)
    assert done.returncode == 0, done.stderr
    held = data_of(output.read_text())["published"]
    assert column(held, "source") == ["somebody"]
    assert column(held, "is_calibration") == [True]
    assert column(held, "error") == pytest.approx([10])
    alone = cli("page", checks, "-o", output)
    assert (alone.returncode, "a page needs a file of records" in alone.stderr) == (
        2,
        True,
    )
