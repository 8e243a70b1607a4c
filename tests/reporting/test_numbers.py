"""The tables of docs/numbers.md, which are written from `measurements.toml`."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import meft_reports
from meft_reports import numbers
from meft_reports.columns import COLUMNS
from meft_reports.data_files import MEASUREMENTS, METHODS
from meft_reports.errors import ReportError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "numbers.md"


def test_the_page_is_what_the_command_writes(tmp_path: Path) -> None:
    """`python -m meft_reports.numbers docs/numbers.md` changes nothing."""
    copied = tmp_path / "numbers.md"
    shutil.copy(PAGE, copied)
    assert numbers.main([str(copied)]) == 0
    assert copied.read_text() == PAGE.read_text()


def test_every_meaning_is_a_sentence() -> None:
    """It begins with a capital and ends in a full stop."""
    for column in COLUMNS:
        if column.group:
            assert re.fullmatch(r"[A-Z].*\.", column.meaning), column.name
            assert column.how, column.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "should have one table, has 0"),
        (
            "<!-- numbers: memry -->\n<!-- end -->",
            "unknown group 'memry': did you mean",
        ),
        (f"{PAGE.read_text()}\n<!-- numbers: memory -->\n<!-- end -->", "has 2"),
    ],
)
def test_a_page_without_a_place_for_each_table_is_refused(
    text: str, message: str
) -> None:
    """So that no number is left out."""
    with pytest.raises(ReportError, match=message):
        numbers.update(text)


def test_a_page_that_is_not_utf8_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "numbers.md"
    path.write_bytes(b"\xff")
    assert numbers.main([str(path)]) == 2
    assert re.fullmatch(rf"{path}: 'utf-8' codec can't .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("file", "text", "place"),
    [
        (METHODS, "[a\n", "line 1"),
        (METHODS, "[full]\ncolr = 1\n", r"\[full\]: unknown field 'colr'"),
        (MEASUREMENTS, "a = 1\n", "'a' is not a table"),
        (MEASUREMENTS, "[a]\ntype = 'int'\n", r"\[a\]: no `group`"),
        (
            MEASUREMENTS,
            "[a]\ntype = 'long'\ngroup = 'time'\nmeaning = 'A.'\nhow = 'b'\n",
            r"\[a\]: `type` = 'long' should be one of int, ",
        ),
    ],
)
def test_a_wrong_data_file_is_one_line(
    tmp_path: Path, file: str, text: str, place: str
) -> None:
    """It names the file and the place, and the command is a mistake of the user."""
    done = _with_data_file(tmp_path, file, text, "meft_reports", "page", "a", "-o", "b")
    assert done.returncode == 2
    assert re.fullmatch(rf"meft-report page: .*{file}: .*{place}.*\n", done.stderr)


def test_the_tables_of_a_wrong_data_file_are_not_written(tmp_path: Path) -> None:
    """The document stays as it is."""
    document = tmp_path / "numbers.md"
    document.write_text("before")
    words = ("meft_reports.numbers", str(document))
    done = _with_data_file(tmp_path, MEASUREMENTS, "a = 1\n", *words)
    assert (done.returncode, document.read_text()) == (2, "before")
    assert re.fullmatch(rf"{document}: .*{MEASUREMENTS}: .*\n", done.stderr)


def _with_data_file(
    tmp_path: Path, file: str, text: str, *words: str
) -> "subprocess.CompletedProcess[str]":
    """Run a module of a copy of the reports, in which a data file has another text."""
    copied = tmp_path / "reports" / "meft_reports"
    source = Path(meft_reports.__file__).parent
    shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "benchmarks").mkdir()
    for name in (METHODS, MEASUREMENTS):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / "benchmarks")
    (tmp_path / "benchmarks" / file).write_text(text)
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(copied.parent)},
        capture_output=True,
        text=True,
    )
