"""The page in a headless Chromium: what a reader can do with it."""

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from meft_reports.frame import read_frame, to_frame
from reporting.browser import Browser, find_chromium
from reporting.conftest import build_all, build_record
from reporting.pages import page_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None, reason="needs a Chromium of the system on the path"
    ),
]

ROOT = Path(__file__).parents[2] / "reports" / "published"
PUBLISHED = sorted(ROOT.glob("*/records.jsonl.gz"))
MEMORY_PAPER = ROOT / "memory-paper" / "records.jsonl.gz"
NASTY = "</script><script>window.hacked = 1</script><img src=x onerror=hacked=1>'\"&"


def shown_rows(page: Browser) -> list[str]:
    rows = page.run(
        "return [...document.querySelectorAll('#cells tbody tr')].map(r => r.innerText)"
    )
    return list(rows)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 2560])
@pytest.mark.parametrize("name", ["all", "scores"])
def test_it_fits_into_any_window(
    browser: Browser, folder: Path, name: str, width: int, dark: bool
) -> None:
    """Nothing scrolls sideways, the console is empty, and no request leaves."""
    browser.open((folder / f"{name}.html").as_uri(), width=width, dark=dark)
    sizes = browser.run(
        "const d = document.documentElement;"
        "return [d.scrollWidth, d.clientWidth, d.scrollHeight]"
    )
    assert sizes[0] == sizes[1]
    if width == 1280:
        assert sizes[2] <= 5000
    assert browser.console == []
    assert {r.partition(":")[0] for r in browser.requests} <= {"file", "blob", "data"}
    assert browser.run("return document.querySelectorAll('#figures svg').length") > 2


def test_labels_never_overlap(browser: Browser, folder: Path) -> None:
    for width in (390, 1280):
        browser.open((folder / "scores.html").as_uri() + "#labels=all", width=width)
        boxes = browser.run(
            "return [...document.querySelectorAll('#figure-scores .labels_marks text,"
            " #figure-scores g.mark-text.labels_marks text')].map(e => {"
            "const b = e.getBoundingClientRect(); return [b.left, b.right, b.top,"
            " b.bottom]})"
        )
        assert boxes
        for place, one in enumerate(boxes):
            for other in boxes[:place]:
                apart = (
                    one[1] <= other[0] + 1
                    or other[1] <= one[0] + 1
                    or one[3] <= other[2] + 3
                    or other[3] <= one[2] + 3
                )
                assert apart, (one, other)


def test_every_choice_draws_a_figure(page: Browser) -> None:
    """Whatever a selector is set to, the others move to where there are cells."""
    selectors = page.run(
        "return [...document.querySelectorAll('#choice select')]"
        ".map(s => [s.id, [...s.options].map(o => o.value)])"
    )
    assert len(selectors) > 3
    for name, values in selectors:
        for value in values:
            page.run(
                f"const s = document.getElementById({json.dumps(name)});"
                f"s.value = {json.dumps(value)};"
                "s.dispatchEvent(new Event('change')); await window.pageDrawn();"
            )
            shown = page.run(
                f"return [document.getElementById({json.dumps(name)}).value,"
                "document.querySelectorAll('#figures svg').length]"
            )
            assert shown[0] == value
            assert shown[1] > 0, (name, value)
    assert page.console == []


def test_the_table_is_sorted_by_numbers(page: Browser) -> None:
    """Bytes by their size and not by their text."""
    page.run(
        "const table = jQueryOfPage('#cells').DataTable();"
        "const place = [...document.querySelectorAll('#cells thead th')]"
        ".findIndex(th => th.innerText.includes('peak allocated'));"
        "table.order([table.column.index('fromVisible', place), 'desc']).draw()"
    )
    order = page.run(
        "const t = jQueryOfPage('#cells').DataTable();"
        "return t.rows({order: 'applied', search: 'applied'}).data().toArray()"
        ".map(i => pageCell('peak_allocated_bytes', i))"
    )
    known = [size for size in order if size is not None]
    assert known == sorted(known, reverse=True)
    assert order[: len(known)] == known


def test_the_table_is_searched_and_filtered(page: Browser) -> None:
    page.run(
        "const s = document.getElementById('filter-status'); s.value = 'oom';"
        "s.dispatchEvent(new Event('change'))"
    )
    assert shown_rows(page)
    assert all("oom" in row for row in shown_rows(page))
    page.run("document.querySelector('#filters .link').click()")
    page.run("jQueryOfPage('#cells').DataTable().search('meft3').draw()")
    assert all("meft3" in row for row in shown_rows(page))


def test_a_caveat_filters_the_table(page: Browser) -> None:
    page.run(
        "const caveat = [...document.querySelectorAll('.caveat')]"
        ".find(c => c.innerText.includes('out of memory'));"
        "caveat.open = true; caveat.querySelector('button').click()"
    )
    assert all("oom" in row for row in shown_rows(page))


def test_a_cell_opens_by_keyboard_and_closes(page: Browser) -> None:
    """Escape closes it, and the focus is where it was."""
    page.run("document.querySelector('#cells tbody button').focus()")
    page.press("Enter", 13)
    page.wait_for("document.getElementById('cell').open")
    text = page.run("return document.getElementById('cell').innerText")
    for expected in ("Run it again", "Measurements", "Environment", "Versions"):
        assert expected in text
    command = page.run("return document.getElementById('command').innerText")
    assert command.startswith("meft-bench run example --only '")
    assert command.endswith("' --force")
    page.press("Escape", 27)
    page.wait_for("!document.getElementById('cell').open")
    assert page.run("return document.activeElement.dataset.cell") is not None


def test_the_command_is_copied(page: Browser) -> None:
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    page.run("document.querySelector('#cells tbody button').click()")
    page.wait_for("document.getElementById('cell').open")
    page.run(
        "const b = [...document.querySelectorAll('#cell button')]"
        ".find(b => b.textContent == 'Copy the command'); b.click()"
    )
    page.wait_for(
        "[...document.querySelectorAll('#cell button')]"
        ".some(b => b.textContent == 'Copied')"
    )
    copied = page.run("return navigator.clipboard.readText()")
    assert copied == page.run("return document.getElementById('command').innerText")


def test_every_cell_has_a_link(browser: Browser, folder: Path) -> None:
    """The address of an open cell opens it again."""
    address = (folder / "scores.html").as_uri()
    browser.open(address)
    browser.run("document.querySelectorAll('#cells tbody button')[3].click()")
    link = browser.run("return location.href")
    assert "#cell=" in link
    name = browser.run("return document.querySelector('#cell code').innerText")
    browser.open(link)
    assert browser.run("return document.getElementById('cell').open")
    again = browser.run("return document.querySelector('#cell code').innerText")
    assert again == name


def test_a_choice_is_in_the_address(browser: Browser, folder: Path) -> None:
    address = (folder / "all.html").as_uri()
    browser.open(f"{address}#dtype=bf16&task=synthetic")
    assert browser.run("return document.getElementById('choose-dtype').value") == "bf16"


def test_records_of_the_page_are_records(page: Browser, tmp_path: Path) -> None:
    """What the page saves is read as the same frame that the page was made of."""
    path = tmp_path / "cells.jsonl"
    path.write_text(page.run("return pageRecords()"))
    again, first = read_frame([path]), to_frame(build_all())
    kept = [name for name in first if name not in ("newest_code",)]
    assert again[kept].astype(str).equals(first[kept].astype(str))


def test_tab_reaches_selectors_headers_and_rows(page: Browser) -> None:
    seen = set()
    for _ in range(150):
        page.press("Tab", 9)
        seen.add(
            page.run(
                "const e = document.activeElement;"
                "return e.closest('#choice') ? 'choice' : e.closest('#cells thead')"
                " ? 'header' : e.closest('#cells tbody') ? 'row' : e.tagName"
            )
        )
    assert {"choice", "header", "row", "SUMMARY"} <= seen


def test_fits_is_said_only_where_the_other_did_not(
    browser: Browser, tmp_path: Path
) -> None:
    """Where the other was not run, there is a dot."""
    records = [
        build_record(
            "oom" if method == "full" and seq_len == 64 else "ok",
            method=method,
            seq_len=seq_len,
            task="synthetic",
        )
        for seq_len in (32, 64, 96, 128)
        for method in ("full", "lora")
        if (method, seq_len) != ("full", 32)
    ]
    path = tmp_path / "fits.html"
    path.write_text(page_of(to_frame(records)))
    browser.open(path.as_uri())
    shown = browser.run(
        "return [...document.querySelectorAll('#figure-matrix .mark-text text')]"
        ".filter(e => e.__data__.datum?.short)"
        ".map(e => `${e.__data__.datum.workload.match(/\\d+.(\\d+)/)[1]}"
        " ${e.__data__.datum.method} ${e.textContent}`)"
    )
    assert "32 lora ·" in shown
    assert "64 lora fits" in shown
    assert "64 full ×" in shown  # noqa: RUF001


def test_the_page_opens_an_example(page: Browser) -> None:
    page.run("document.querySelector('[data-open]').click()")
    page.wait_for("document.getElementById('cell').open")
    method = page.run("return document.querySelector('[data-open]').textContent")
    shown = page.run("return document.getElementById('cell-title').textContent")
    assert shown.startswith(method)


def test_text_of_a_record_stays_text(browser: Browser, tmp_path: Path) -> None:
    """In the head, the figures, the table, the dialog and the tooltips."""
    records = build_all()[:40]
    for place, record in enumerate(records):
        record["cell_id"] = f"{place}{NASTY}"
        record["sweep"] = record["message"] = NASTY
        record["cell"]["backbone"] += NASTY
        if place % 3 == 0:
            record["cell"]["method"] += NASTY
    path = tmp_path / "nasty.html"
    path.write_text(page_of(to_frame(records)))
    browser.open(path.as_uri())
    browser.run("document.querySelector('#cells tbody button').click()")
    browser.wait_for("document.getElementById('cell').open")
    assert browser.run("return window.hacked") is None
    assert browser.console == []
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert NASTY in browser.run("return document.getElementById('cell').innerText")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast(browser: Browser, folder: Path, dark: bool) -> None:
    """At least 4.5 between each color of text and its background."""
    browser.open((folder / "all.html").as_uri(), dark=dark)
    ratios = browser.run("""
        const style = getComputedStyle(document.documentElement);
        const channel = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = (name) => {
          const hex = style.getPropertyValue(name).trim().slice(1);
          const full = hex.length == 3 ? [...hex].map((c) => c + c).join('') : hex;
          const [r, g, b] = [0, 2, 4].map((i) =>
            channel(parseInt(full.slice(i, i + 2), 16) / 255));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ratio = (a, b) => {
          const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
          return (x + 0.05) / (y + 0.05);
        };
        const pairs = [['--fg', '--bg'], ['--muted', '--bg'], ['--accent', '--bg'],
          ['--fg', '--warn'], ['--muted', '--warn'], ['--fg', '--tint'],
          ['--good', '--bg'], ['--bad', '--bg'], ['--fg', '--heat-oom'],
          ['--fg', '--heat-fits'],
          ...[0, 1, 2, 3, 4, 5, 6, 7].map((n) => ['--fg', `--heat${n}`])];
        return pairs.map(([a, b]) => [a, b, ratio(a, b)]);
    """)
    assert [pair for pair in ratios if pair[2] < 4.5] == []


def test_paper_has_every_figure_and_no_control(page: Browser) -> None:
    page.call("Emulation.setEmulatedMedia", media="print")
    shown = page.run(
        "const seen = (e) => e && getComputedStyle(e).display != 'none';"
        "return [seen(document.getElementById('choice')),"
        "[...document.querySelectorAll('.tools')].some(seen),"
        "[...document.querySelectorAll('#figures svg')].every(seen)]"
    )
    page.call("Emulation.setEmulatedMedia", media="")
    assert shown == [False, False, True]


def test_a_figure_has_a_text_equivalent(page: Browser) -> None:
    texts = page.run(
        "return [...document.querySelectorAll('#figures svg')]"
        ".map(s => s.getAttribute('aria-label') ?? s.querySelector('[aria-label]')"
        "?.getAttribute('aria-label'))"
    )
    assert texts
    assert all(text and len(text) > 30 for text in texts)


# An id `gpu` alone would be the mark of tests that need one.
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}-run")
def test_published_runs_fit(browser: Browser, tmp_path: Path, path: Path) -> None:
    """Of each: no sideways scrolling at 390, at most 5,000 px at 1280, no message."""
    page = tmp_path / "page.html"
    page.write_text(page_of(read_frame([path])))
    for width in (390, 1280):
        browser.open(page.as_uri(), width=width)
        sizes = browser.run(
            "const d = document.documentElement;"
            "return [d.scrollWidth, d.clientWidth, d.scrollHeight]"
        )
        assert sizes[0] == sizes[1]
        assert width == 390 or sizes[2] <= 5000
        assert browser.console == []


def test_ten_thousand_cells_are_a_page(browser: Browser, tmp_path: Path) -> None:
    """Made in 10 s of a processor and 500 MB, of at most 3 MB, and ready in seconds."""
    lines = gzip.decompress(MEMORY_PAPER.read_bytes()).splitlines()
    runs, page = tmp_path / "runs.jsonl", tmp_path / "page.html"
    with runs.open("w") as file:
        for number in range(10_000):
            record = json.loads(lines[number % len(lines)])
            record["cell_id"] += f"/{number}"
            record["cell"]["seq_len"] = 128 * (1 + number // len(lines))
            file.write(json.dumps(record) + "\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "meft_reports", "page", str(runs), "-o", str(page)]
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 15  # 10, on a machine that does nothing else
    assert page.stat().st_size < 3e6
    browser.open(page.as_uri())
    assert browser.console == []
    rows = browser.run("return jQueryOfPage('#cells').DataTable().rows().count()")
    assert rows == 10_000
