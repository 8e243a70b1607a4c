"""What a record keeps of the log of its child."""

import os
import sys
from pathlib import Path

import pytest

from meft_bench.parent.engines import logs


def tail_of(folder: Path, content: bytes) -> str:
    path = folder / "log"
    path.write_bytes(content)
    return logs.tail(path)


def test_the_last_lines_without_what_a_terminal_needs(tmp_path: Path) -> None:
    """Colours go; of a progress bar its last state stays; so does what is no UTF-8."""
    content = (
        b"USDT:1 x\none\n\n  \x1b[31mtwo\x1b[0m\n 10%\r 50%\r100%\r\n\xff\x00three\n"
    )
    assert tail_of(tmp_path, content) == "one\n  two\n100%\n\ufffdthree"
    assert logs.last_line(tmp_path / "log") == "\ufffdthree"


def test_a_long_log_is_cut_at_its_beginning(tmp_path: Path) -> None:
    many = b"".join(b"%d\n" % number for number in range(100_000))
    last = [str(number) for number in range(99_980, 100_000)]
    assert tail_of(tmp_path, many).splitlines() == last
    assert len(tail_of(tmp_path, b"x" * 10**6)) == logs.CHARACTERS


def test_a_log_that_is_gone_has_no_lines(tmp_path: Path) -> None:
    """A child can remove or replace it; its record is kept all the same."""
    assert logs.tail(tmp_path / "none") == ""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        assert logs.tail(path) == logs.last_line(path) == ""


def test_tabs_and_titles(tmp_path: Path) -> None:
    assert tail_of(tmp_path, b"a\tb\x1b]0;title\x07c\n") == "a    bc"


def test_an_empty_log_has_no_lines(tmp_path: Path) -> None:
    assert tail_of(tmp_path, b"\n \n") == ""
    assert logs.last_line(tmp_path / "log") == ""


def test_paths_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record is read on other machines, by other people."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    lines = [f"{tmp_path}/a.py:1", "/home/someone/b.py:2", f"{sys.prefix}/lib/c.py:3"]
    assert tail_of(tmp_path, "\n".join(lines).encode()).splitlines() == [
        "./a.py:1",
        "~/b.py:2",
        ".../lib/c.py:3",
    ]
