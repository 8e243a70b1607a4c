"""The page on paper: what a headless Chromium prints, read by the tools of poppler."""

import base64
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from meft_reports.frame import read_frame
from reporting.browser import Browser, find_chromium
from reporting.pages import page_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None, reason="needs a Chromium of the system on the path"
    ),
    pytest.mark.skipif(
        shutil.which("pdftotext") is None, reason="needs poppler's tools on the path"
    ),
]

ROOT = Path(__file__).parents[2] / "reports" / "published"
# By run: the width of the window in which it is printed, and its scheme.
RUNS = {
    "memory-paper": (1280, "light"),
    "knowledge": (1280, "dark"),
    "gpu": (800, "dark"),
    "depth": (390, "light"),
}
MOST_PAGES = 8
A4_INCHES = 8.27, 11.69
CONTROLS = {
    *("Save as SVG", "Show these cells", "Show all cells", "Columns", "CSV"),
    *("Records", "Search", "a page", "labels", "compared with", "scales", "number"),
    *("panels by", "along", "Skip to the table of all cells", "Next", "Previous"),
}


class Paper(NamedTuple):
    path: Path
    pages: list[str]
    """The text of each page, with single spaces."""
    lines: list[str]
    figures: list[tuple[str, str]]
    """The title of each figure on the screen, and the sentence below it."""
    num_cells: int


def in_one_line(text: str) -> str:
    return " ".join(text.split())


# An id `gpu` alone would be the mark of tests that need one.
@pytest.fixture(scope="module", params=RUNS, ids=lambda name: f"{name}-run")
def paper(
    request: pytest.FixtureRequest,
    browser: Browser,
    tmp_path_factory: pytest.TempPathFactory,
) -> Paper:
    """The page of a published run, printed."""
    folder = tmp_path_factory.mktemp("paper")
    frame = read_frame([ROOT / request.param / "records.jsonl.gz"])
    (folder / "page.html").write_text(page_of(frame))
    width, scheme = RUNS[request.param]
    address = (folder / "page.html").as_uri()
    browser.open(address, width=width, dark=scheme == "dark")
    figures = browser.run(
        "return [...document.querySelectorAll('#figures section')].map(s =>"
        "[s.querySelector('h2').innerText, s.querySelector('.said').innerText])"
    )
    inches = dict(zip(("paperWidth", "paperHeight"), A4_INCHES, strict=True))
    printed = browser.call("Page.printToPDF", printBackground=True, **inches)
    path = folder / "page.pdf"
    path.write_bytes(base64.b64decode(printed["data"]))
    text = subprocess.run(
        ["pdftotext", "-layout", path, "-"], check=True, capture_output=True, text=True
    ).stdout
    pages = [in_one_line(page) for page in text.split("\f")[:-1]]
    lines = [in_one_line(line) for line in text.splitlines()]
    return Paper(path, pages, lines, figures, len(frame))


def test_it_is_a_few_pages(paper: Paper) -> None:
    assert 2 <= len(paper.pages) <= MOST_PAGES


def test_every_figure_is_whole(paper: Paper) -> None:
    """Its title and the sentence below it are on one page."""
    assert len(paper.figures) > 3
    for title, said in paper.figures:
        (place,) = [n for n, page in enumerate(paper.pages) if title in page]
        assert in_one_line(said)[-25:] in paper.pages[place], (title, said)


def test_no_control_is_printed(paper: Paper) -> None:
    assert CONTROLS & set(paper.lines) == set()
    text = " ".join(paper.pages)
    assert not re.search("Save as SVG|Show these cells|Sort by a column|Search", text)


def test_the_table_says_where_the_rest_is(paper: Paper) -> None:
    text = " ".join(paper.pages)
    assert f"All {paper.num_cells:,} cells are in the file of this page" in text
    assert "Where the numbers come from" in text


def test_it_is_light(paper: Paper) -> None:
    """Whatever the scheme of the screen."""
    picture = subprocess.run(
        ["pdftoppm", "-gray", "-r", "20", paper.path], check=True, capture_output=True
    ).stdout
    assert picture.startswith(b"P5")
    assert sum(picture) / len(picture) > 215


def test_tables_fit_on_paper(browser: Browser, paper: Paper) -> None:
    """No column is beyond the edge of a page."""
    width = round(96 * (A4_INCHES[0] - 2 * 12 / 25.4))
    browser.open((paper.path.parent / "page.html").as_uri(), width=width)
    browser.call("Emulation.setEmulatedMedia", media="print")
    edges = browser.run(
        "return [...document.querySelectorAll('#cells, .origins table, #figures svg')]"
        ".map(e => e.getBoundingClientRect().right)"
    )
    browser.call("Emulation.setEmulatedMedia", media="")
    assert len(edges) > 4
    assert max(edges) <= width
