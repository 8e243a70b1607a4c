"""The page by keyboard alone, with real key events in a headless Chromium."""

from pathlib import Path
from typing import Any

import pytest

from meft_reports.frame import read_frame
from reporting.browser import Browser, find_chromium
from reporting.pages import page_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None, reason="needs a Chromium of the system on the path"
    ),
]

ROOT = Path(__file__).parents[2] / "reports" / "published"
RUNS = {"memory": "memory-paper", "scores": "knowledge"}
MOST_TABS = 300
HEIGHT = "e.getBoundingClientRect().y + scrollY"
# What a mouse opens: the browser shows a hand there.
MARKS = """[...document.querySelectorAll('#figures svg path')]
  .filter((e) => e.__data__?.cursor == 'pointer')"""


@pytest.fixture(scope="module", params=RUNS)
def page(
    request: pytest.FixtureRequest,
    browser: Browser,
    tmp_path_factory: pytest.TempPathFactory,
) -> Browser:
    """The page of a published run, opened: one of memory, one of scores."""
    path = tmp_path_factory.mktemp("keys") / "page.html"
    records = ROOT / RUNS[request.param] / "records.jsonl.gz"
    path.write_text(page_of(read_frame([records])))
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
    browser.open(path.as_uri())
    return browser


def focused(page: Browser, expression: str) -> Any:
    return page.run(f"const e = document.activeElement; return {expression}")


def test_tab_reaches_every_control(page: Browser) -> None:
    """Every selector, button, header and row, and each figure with marks once."""
    page.run("""
        const all = 'a[href], button:not(:disabled, .disabled), select, input, summary,'
          + ' #cells thead .dt-column-order, #figures svg [tabindex="0"]';
        window.wanted = [...document.querySelectorAll(all)].filter((e) =>
          e.checkVisibility({contentVisibilityAuto: true, visibilityProperty: true}));
        window.reached = [];
        document.activeElement.blur(); getSelection().removeAllRanges();
    """)
    for _ in range(MOST_TABS):
        page.press("Tab", 9)
        if focused(page, "reached.includes(e)"):
            break
        focused(page, "void reached.push(e)")
    missed = page.run(
        "return wanted.filter(e => !reached.includes(e))"
        ".map(e => `${e.tagName} ${e.id} ${e.className} ${e.textContent}`)"
    )
    assert missed == []
    stops = page.run(
        "return [...document.querySelectorAll('#figures svg')].map(svg =>"
        " [svg.querySelectorAll('[role=button]').length > 0,"
        " reached.filter(e => svg.contains(e)).length])"
    )
    assert len(stops) > 2
    assert all(number == has_marks for has_marks, number in stops)


def test_arrows_reach_every_mark_that_opens_a_cell(page: Browser) -> None:
    """From the first to the last in reading order, each with a name in words."""
    page.run(f"window.marks = {MARKS}; window.reached = []")
    figures = page.run("return [...new Set(marks.map(e => e.closest('section').id))]")
    assert figures
    for figure in figures:
        page.run(f"document.querySelector('#{figure} svg [tabindex=\"0\"]').focus()")
        page.press("End", 35)
        last = focused(page, "e.id")
        page.press("Home", 36)
        for _ in range(1000):
            focused(page, "void reached.push(e)")
            if focused(page, "e.id") == last:
                break
            page.press("ArrowRight", 39)
    missed = page.run(
        "return marks.filter(e => !reached.includes(e)).map(e => e.outerHTML)"
    )
    assert missed == []
    assert page.run("return reached.length == new Set(reached).size")
    names = page.run("return reached.map(e => e.getAttribute('aria-label'))")
    assert all(len(name) > 10 for name in names)
    assert not [n for n in names if "NaN" in n or "undefined" in n or "null" in n]
    before = page.run(
        "return reached.map((e, i) => { const a = e.getBoundingClientRect(),"
        " b = reached[i - 1]?.getBoundingClientRect();"
        " return !b || e.closest('svg') != reached[i - 1].closest('svg')"
        " || a.y + a.height / 2 > b.y + b.height / 2 - 0.5"
        " || a.x + a.width / 2 >= b.x + b.width / 2; })"
    )
    assert all(before)


@pytest.mark.parametrize(("key", "code"), [("Enter", 13), (" ", 32)])
def test_a_mark_opens_its_cell_and_gets_the_focus_back(
    page: Browser, key: str, code: int
) -> None:
    """By Enter and by Space; Escape closes it. A ring shows where the focus is."""
    ids = page.run(
        "return [...document.querySelectorAll('#figures svg [tabindex=\"0\"]')]"
        ".map(e => e.id)"
    )
    assert len(ids) >= 2
    for first in ids:
        page.run(f"document.getElementById('{first}').focus()")
        page.press("Home", 36)
        first = focused(page, "e.id")
        page.press("ArrowRight", 39)
        place = focused(page, "e.id")
        assert place != first
        rings = page.run(
            "const e = document.activeElement.getBoundingClientRect();"
            "return [...document.querySelectorAll('.ring')].map(ring => {"
            "const r = ring.getBoundingClientRect();"
            "return r.left < e.left && r.right > e.right && r.top < e.top"
            " && r.bottom > e.bottom})"
        )
        assert rings == [True]
        expected = focused(page, "pageCell('cell_id', e.__data__.datum.cell)")
        page.press(key, code)
        page.wait_for("document.getElementById('cell').open")
        shown = page.run("return document.querySelector('#cell code').textContent")
        assert shown == expected
        page.press("Escape", 27)
        page.wait_for("!document.getElementById('cell').open")
        assert focused(page, "e.id") == place
    assert page.console == []


def test_arrows_up_and_down_go_to_the_next_row(page: Browser) -> None:
    page.run("document.getElementById('memory-mark-0').focus()")
    top = focused(page, HEIGHT)
    page.press("ArrowDown", 40)
    assert focused(page, HEIGHT) > top
    page.press("ArrowUp", 38)
    assert focused(page, "e.id") == "memory-mark-0"
    page.press("ArrowUp", 38)  # there is no row above: it stays
    assert focused(page, "e.id") == "memory-mark-0"


def test_a_focused_mark_shows_its_numbers(page: Browser) -> None:
    """The same box as under a mouse; it goes when the focus goes."""
    tip = "document.querySelector('#vg-tooltip-element.visible')"
    page.run("document.getElementById('memory-mark-1').focus()")
    page.press("ArrowDown", 40)
    page.wait_for(tip)
    name = focused(page, "e.getAttribute('aria-label')").split("; ")[0].split(": ")[1]
    assert name in page.run(f"return {tip}.innerText")
    page.press("Tab", 9)
    page.wait_for(f"!{tip}")


def test_a_figure_drawn_again_keeps_the_focus(page: Browser) -> None:
    """Also behind an open cell: the window may be turned meanwhile."""
    page.run("document.getElementById('memory-mark-2').focus()")
    page.press("Enter", 13)
    page.wait_for("document.getElementById('cell').open")
    page.run("window.before = document.getElementById('memory-mark-2')")
    page.resize(1000)
    page.wait_for("!before.isConnected")
    page.run("await pageDrawn()")
    page.press("Escape", 27)
    page.wait_for("!document.getElementById('cell').open")
    assert focused(page, "e.id") == "memory-mark-2"
    page.resize(1280)
    page.wait_for("!document.activeElement.isConnected || document.activeElement != 0")
    page.run("await new Promise(done => setTimeout(done, 400)); await pageDrawn()")
    assert focused(page, "e.id") == "memory-mark-2"


def test_a_click_on_a_mark_gets_the_focus_back(page: Browser) -> None:
    place = page.run(
        "const e = document.getElementById('memory-mark-0');"
        "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
        "return [b.x + b.width / 2, b.y + b.height / 2]"
    )
    for kind in ("mousePressed", "mouseReleased"):
        page.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=place[0],
            y=place[1],
            button="left",
            clickCount=1,
        )
    page.wait_for("document.getElementById('cell').open")
    page.press("Escape", 27)
    page.wait_for("!document.getElementById('cell').open")
    assert focused(page, "e.id") == "memory-mark-0"


def test_columns_are_chosen_by_keyboard(page: Browser) -> None:
    """The list opens by Enter, a column is switched, Escape closes the list."""
    page.run("document.querySelector('.buttons-colvis').focus()")
    before = page.run("return document.querySelectorAll('#cells thead th').length")
    page.press("Enter", 13)
    page.wait_for("document.querySelector('div.dt-button-collection')")
    for _ in range(2):
        page.press("Tab", 9)
        if focused(page, "Boolean(e.closest('div.dt-button-collection'))"):
            break
    assert focused(page, "Boolean(e.closest('div.dt-button-collection'))")
    page.press("Enter", 13)
    assert (
        page.run("return document.querySelectorAll('#cells thead th').length") != before
    )
    page.press("Enter", 13)
    page.press("Escape", 27)
    page.wait_for("!document.querySelector('div.dt-button-collection')")
    assert focused(page, "e.matches('.buttons-colvis')")


def test_a_header_sorts_by_keyboard(page: Browser) -> None:
    page.run("document.querySelector('#cells thead .dt-column-order').focus()")
    page.press("Enter", 13)
    page.wait_for("document.querySelector('#cells thead th[aria-sort=ascending]')")
    page.press("Enter", 13)
    page.wait_for("document.querySelector('#cells thead th[aria-sort=descending]')")
    page.press("Enter", 13)
