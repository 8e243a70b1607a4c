import re

import pandas as pd
import pytest
from markupsafe import escape

from meft_reports.frame import read_frame, to_frame
from meft_reports.page import render_page
from meft_reports.plots import PLOTS, find_plot
from reporting.conftest import build_all, build_headline
from reporting.kinds import MakeRecord, Record, Write


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """The frame of some made-up runs, and of every cell that failed."""
    failed = [record for record in build_all() if record["status"] != "ok"]
    return to_frame([*build_headline(), *failed])


@pytest.fixture(scope="module")
def page(frame: pd.DataFrame) -> str:
    """The page of them, with a few figures."""
    return render_page(frame).decode()


@pytest.fixture(scope="module")
def whole_page() -> str:
    """The page of all made-up runs; drawn once, it takes half a minute."""
    return render_page(to_frame(build_all())).decode()


@pytest.mark.slow
def test_the_whole_page_needs_nothing_else(whole_page: str) -> None:
    assert_needs_nothing_else(whole_page)


def test_the_page_needs_nothing_else(page: str) -> None:
    assert_needs_nothing_else(page)


def assert_needs_nothing_else(page: str) -> None:
    """Every source is inside it; links go to its own headings."""
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(s.startswith(("data:image/svg+xml;base64,", "#")) for s in sources)
    for anchor in (s[1:] for s in sources if s.startswith("#")):
        assert f'id="{anchor}"' in page
    assert not re.search(r"<script|<link|@import|url\(", page)


@pytest.mark.slow
def test_the_same_records_give_the_same_page(
    every_kind: list[Record], whole_page: str, write: Write
) -> None:
    """Byte for byte, in whatever order the records were written."""
    shuffled = read_frame([write(reversed(every_kind))])
    assert render_page(shuffled).decode() == whole_page


def test_every_failed_cell_is_on_the_page(frame: pd.DataFrame, page: str) -> None:
    """By name, status and message, escaped."""
    for _, row in frame[frame["status"] != "ok"].iterrows():
        assert str(escape(row["cell_id"])) in page
        assert str(escape(row["message"])) in page
        assert f"cell {row['status']}<" in page or f"cells {row['status']}<" in page
    assert "<b>boom</b>" not in page


@pytest.mark.slow
def test_every_figure_has_a_text_and_a_caption(whole_page: str) -> None:
    """Figures have a text equivalent, and say how they were measured."""
    alts = re.findall(r'<img src="[^"]+" alt="([^"]+)"', whole_page)
    assert len(alts) == len(PLOTS)
    for name in PLOTS:
        assert str(escape(find_plot(name).CAPTION)) in whole_page


def test_a_plot_without_data_says_why(make_record: MakeRecord) -> None:
    """The page of a run that only failed is still a page."""
    text = render_page(to_frame([make_record("oom")])).decode()
    assert text.count("Not drawn: no ") == 3
    assert "<img" not in text


def test_what_a_run_did_not_ask_for_is_not_missed(make_record: MakeRecord) -> None:
    """A run of one task has no word on depth, references or lost bits."""
    text = render_page(to_frame([make_record()])).decode()
    assert "Not drawn" not in text
    assert "Against checkpointed adapters" not in text
    assert "Deviation at the start" not in text
    assert "No cell ran on random input." in text


def test_predictions_are_announced(make_record: MakeRecord) -> None:
    """Before the first number, and how they came about."""
    how = "fake CUDA tensors; by rules that were held against an H200"
    frame = to_frame([make_record("ok", device="virtual-H200", prediction=how)])
    top = render_page(frame).decode().partition("<main>")[0]
    assert "predicted, not measured" in top
    assert how in top
    measured = to_frame([make_record("ok")])
    assert "predicted" not in render_page(measured).decode().partition("<main>")[0]


def test_random_weights_are_announced(make_record: MakeRecord) -> None:
    """Before the first number."""
    frame = to_frame([make_record("oom", backbone="random:bert-tiny")])
    assert "random weights" in render_page(frame).decode().partition("<main>")[0]
