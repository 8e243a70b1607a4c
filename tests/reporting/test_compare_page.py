"""Two runs side by side as an HTML page."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meft_reports.cli import main
from meft_reports.page import bundle
from reporting.browser import Browser, find_chromium
from reporting.kinds import MakeRecord, Record, Write
from reporting.pages import as_text

NASTY = "</script><script>window.hacked = 1</script><img src=x onerror=hacked=1>'\"&"
CELLS = 40


def _breakdown(num_bytes: int) -> dict[str, Any]:
    shape = [num_bytes // 4]
    row: list[Any] = ["activation", "forward", "layer.*", "aten.mm", "float32", shape]
    row += [num_bytes, 1, 1]
    return {
        "peak_bytes": num_bytes,
        "phase": "forward",
        "rows": [row],
        "other_bytes": 0,
        "at_op": 1,
        "num_ops": 2,
        "saved_bytes": num_bytes,
        "saved_rows": [row],
        "saved_other_bytes": 0,
    }


@pytest.fixture
def runs(make_record: MakeRecord, write: Write) -> tuple[Path, Path]:
    """Two runs of many cells: worse, better, the same, and one that failed."""
    before: list[Record] = []
    after: list[Record] = []
    versions = {"python": "3.11.9", "torch": "2.14.0"}
    for seed in range(CELLS):
        size = 1000 + (0, 500, -200, 10)[seed % 4] * (seed % 5 > 0)
        before.append(make_record(seed=seed, saved_bytes=1000))
        after.append(
            make_record(seed=seed, saved_bytes=size, versions=versions, dirty=True)
        )
        before[-1]["memory_breakdown"] = _breakdown(1000)
        after[-1]["memory_breakdown"] = _breakdown(size)
    before.append(make_record(method="lora"))
    after.append(make_record("oom", method="lora", message=NASTY, versions=versions))
    before.append(make_record(method="meft1"))
    return write(before, "before.jsonl"), write(after, "after.jsonl")


@pytest.fixture
def page(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """The page of these runs."""
    path = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "-o", str(path)]) == 0
    return path


def _body(page: Path) -> str:
    text = page.read_text().partition("<body>")[2]
    return text.partition('<script type="application/gzip"')[0]


def _rows(page: Path, name: str) -> list[str]:
    table = re.search(rf'<table id="{name}".*?</table>', _body(page), re.DOTALL)
    assert table is not None
    return re.findall(r"<tr.*?</tr>", table[0], re.DOTALL)[1:]


def test_the_worst_is_first(page: Path) -> None:
    """Each number with before, after, ratio, difference, and what of it grew."""
    worse = _rows(page, "worse")
    ratios = [float(re.findall(r"([\d.]+)×", row)[0]) for row in worse]  # noqa: RUF001
    assert ratios == sorted(ratios, reverse=True)
    assert {1.5, 1.01} == set(ratios)
    assert "<small>1,000 bytes</small>" in worse[0]
    assert "<small>+500 bytes</small>" in worse[0]
    assert "+500 B  activation  in forward  layer.*  aten.mm" in worse[0]
    better = _rows(page, "better")
    assert all("0.8000×" in row for row in better)  # noqa: RUF001


def test_what_concerns_all_cells_is_said_once(page: Path) -> None:
    text = as_text(_body(page))
    assert text.count("2.13.0") == 1
    assert "torch: 2.13.0 → 2.14.0, in all cells" in text
    assert f"with uncommitted changes (code aaaaaaaa), in {CELLS} of" in text


def test_what_is_the_same_is_folded(page: Path) -> None:
    """And what only one run has."""
    body = _body(page)
    assert "<details><summary>Cells without a difference" in body
    assert "<summary>Cells that only the first run has (1)</summary>" in body
    assert "Cells that only the second run has" not in body
    assert " open" not in body.partition("<main>")[2].partition("</main>")[0]


def test_a_text_of_a_record_is_no_markup(page: Path) -> None:
    body = _body(page)
    assert "ok → oom: &lt;/script&gt;&lt;script&gt;window.hacked" in body
    assert "<img" not in body


def test_the_same_runs_give_the_same_bytes(
    runs: tuple[Path, Path], page: Path, tmp_path: Path
) -> None:
    """Whatever the order of their records."""
    for run in runs:
        lines = run.read_text().splitlines(keepends=True)
        run.write_text("".join(reversed(lines)))
    again = tmp_path / "again.html"
    assert main(["compare", *map(str, runs), "-o", str(again)]) == 0
    assert again.read_bytes() == page.read_bytes()


def test_a_page_of_equal_runs_says_so(
    make_record: MakeRecord, write: Write, tmp_path: Path
) -> None:
    """And tells two files of one name apart."""
    (tmp_path / "a").mkdir()
    runs = [write([make_record()], name) for name in ("run.jsonl", "a/run.jsonl")]
    path = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "-o", str(path)]) == 0
    text = as_text(_body(path))
    assert "Nothing: code, machine, versions of packages and weights" in text
    assert "No number is worse." in text
    assert f"{runs[0]} → {runs[1]}" in text


def test_a_difference_from_zero_has_no_ratio(
    make_record: MakeRecord, write: Write, tmp_path: Path
) -> None:
    """Its attribute is a number, so that the table can sort it."""
    sizes = (("before.jsonl", 0), ("after.jsonl", 5))
    runs = [write([make_record(saved_bytes=size)], name) for name, size in sizes]
    path = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "-o", str(path)]) == 0
    (row,) = _rows(path, "worse")
    assert 'data-order="1e+300">from 0</td>' in row


def test_without_its_library_no_page_is_written(
    runs: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The extra that brings it is named."""

    def missing() -> str:
        raise bundle.PageExtraMissing("itables")

    monkeypatch.setattr(bundle, "datatables", missing)
    path = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "-o", str(path)]) == 2
    assert "pip install 'meft[page]'" in capsys.readouterr().err
    assert not path.exists()


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.mark.slow
@pytest.mark.skipif(
    find_chromium() is None, reason="needs a Chromium of the system on the path"
)
def test_a_browser_shows_the_page(browser: Browser, page: Path) -> None:
    """It fits, asks for nothing, is searched, and shows no text as markup."""
    for width in (390, 1280):
        for dark in (False, True):
            browser.open(page.as_uri(), width=width, dark=dark)
            sizes = browser.run(
                "const d = document.documentElement;"
                "return [d.scrollWidth, d.clientWidth]"
            )
            assert sizes[0] == sizes[1], (width, dark)
            assert browser.console == []
            schemes = {address.partition(":")[0] for address in browser.requests}
            assert schemes <= {"file", "blob", "data"}
    assert browser.run("return window.hacked") is None
    count = "document.querySelectorAll('#worse tbody tr').length"
    num_rows = len(_rows(page, "worse"))
    assert browser.run(f"return {count}") == min(num_rows, 25)
    words = json.dumps("seed-that-no-cell-has")
    browser.run(
        "const i = document.querySelector('.dt-search input');"
        f"i.value = {words}; i.dispatchEvent(new Event('input', {{bubbles: true}}));"
    )
    browser.wait_for(
        "document.querySelector('#worse tbody').innerText.includes('Nothing has')"
    )
    color = "getComputedStyle(document.documentElement).backgroundColor"
    assert browser.run(f"return {color}") == "rgb(20, 23, 28)"
