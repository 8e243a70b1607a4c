"""Files of records that hold no number, or no record: a line, and never a traceback."""

import contextlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from marks import slow_but_for
from meft_reports.cli import EXIT_MISTAKE, main
from meft_reports.errors import NothingToDraw
from meft_reports.frame import to_frame
from meft_reports.plots import PLOTS, find_plot
from meft_reports.tables import TABLES, find_tables
from reporting.conftest import build_all
from reporting.kinds import MakeRecord, Write
from reporting.pages import page_of

CHANGES: dict[str, Any] = {
    "no numbers": lambda _: None,
    "empty lists": lambda value: [] if isinstance(value, list) else value,
    "lists of null": lambda value: [None] if isinstance(value, list) else value,
}
ONCE_WRONG = ("activation_curve", "headline", "union_batch")


@pytest.fixture(scope="module", params=CHANGES)
def emptied(request: pytest.FixtureRequest) -> pd.DataFrame:
    """Every made-up run, whose ok cells have measured nothing, or nothing in lists."""
    records, change = build_all(), CHANGES[request.param]
    for record in records:
        seen = record["measurement"]
        record["measurement"] = {name: change(value) for name, value in seen.items()}
    return to_frame(records)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_needs_no_number(emptied: pd.DataFrame, name: str) -> None:
    """It has dashes, or it is not there."""
    find_tables(name)(emptied)


@pytest.mark.parametrize("name", slow_but_for(PLOTS, *ONCE_WRONG))
def test_a_plot_needs_no_number(emptied: pd.DataFrame, name: str) -> None:
    """It says what is missing, or draws the rest."""
    with contextlib.suppress(NothingToDraw):
        find_plot(name).draw(emptied)


def test_a_page_needs_no_number(emptied: pd.DataFrame) -> None:
    assert "</html>" in page_of(emptied)


def commands(run: Path, other: Path, folder: Path) -> list[list[str]]:
    """Every command with a file, in each place in which it reads one."""
    check = ["--fail-on", "saved:0", "--baseline"]
    return [
        ["frame", f"{run}", "-o", f"{folder / 'cells.csv'}"],
        ["plot", "score_memory", f"{run}", "-o", f"{folder / 'plot.svg'}"],
        ["table", "results", f"{run}"],
        ["page", f"{run}", "-o", f"{folder / 'page.html'}"],
        ["baseline", f"{run}", "-o", f"{folder / 'new.jsonl'}"],
        ["check", f"{run}", *check, f"{other}"],
        ["check", f"{other}", *check, f"{run}"],
        ["compare", f"{run}", f"{other}"],
        ["compare", f"{other}", f"{run}"],
        ["compare", f"{other}", f"{run}", "-o", f"{folder / 'compare.html'}"],
        ["history", "saved", f"{run}"],
        ["history", "saved", f"{other}", f"{run}"],
    ]


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_records_is_one_line(
    make_record: MakeRecord,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(text)
    for words in commands(empty, write([make_record()]), tmp_path):
        assert main(words) == EXIT_MISTAKE, words
        errors = capsys.readouterr().err
        assert f"{empty} holds no record; " in errors
        assert errors.count("\n") == 1


def test_a_file_of_failed_cells_is_no_bug(
    make_record: MakeRecord,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each command says how they ended, or what is missing."""
    kinds = ("oom", "error", "timeout", "killed", "skipped")
    failed = write([make_record(kind, seed=i) for i, kind in enumerate(kinds)])
    other = write([make_record(seed=0)], "other.jsonl")
    for words in commands(failed, other, tmp_path):
        assert main(words) in (0, 2, 3, 4), words
        assert "Traceback" not in capsys.readouterr().err
