from pathlib import Path

import pytest

from meft_reports.errors import RecordError
from meft_reports.frame import to_frame
from meft_reports.page.timeline import MOST_POINTS, read_timelines
from reporting.kinds import MakeRecord
from reporting.pages import data_of, page_of

HEADER = "method,time,phase,saved,frozen\n"


def write(folder: Path, lines: str) -> Path:
    path = folder / "moments.csv"
    path.write_text(HEADER + lines)
    return path


def test_a_long_step_keeps_its_peak(tmp_path: Path) -> None:
    """Of ten thousand moments, a few hundred are shown, the largest among them."""
    lines = "".join(
        f"full,{time},forward,{9999 if time == 7003 else time % 7},5\n"
        for time in range(10_000)
    )
    (found,) = read_timelines([write(tmp_path, lines)])
    assert len(found.moments) == MOST_POINTS
    assert (7003, "forward", (9999, 5)) in found.moments
    times = [time for time, _, _ in found.moments]
    assert times == sorted(times)


def test_methods_have_a_timeline_each(tmp_path: Path, make_record: MakeRecord) -> None:
    path = write(tmp_path, "full,1,forward,2,3\nlora,1,forward,4,5\n")
    page = page_of(to_frame([make_record()]), timelines=read_timelines([path]))
    held = data_of(page)["timelines"]
    assert [(t["method"], t["kinds"], t["bytes"]) for t in held] == [
        ("full", ["saved", "frozen"], [[2, 3]]),
        ("lora", ["saved", "frozen"], [[4, 5]]),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a file of moments"),
        ("a,b\n1,2\n", "not a file of moments"),
        (HEADER + "full,1,forward,2\n", "line 2: not a moment"),
        (HEADER + "full,1,forward,2,-3\n", "line 2: not a moment"),
        (HEADER + "full,x,forward,2,3\n", "line 2: not a moment"),
        (HEADER + "full,1\n", "line 2: not a moment"),
        (HEADER + "x" * 200_000, "not a file of moments: field larger"),
        (HEADER.strip() + "\rfull,1", "not a file of moments: new-line"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "moments.csv"
    path.write_text(content)
    with pytest.raises(RecordError, match=message):
        read_timelines([path])


def test_too_many_methods_are_refused(tmp_path: Path) -> None:
    lines = "".join(f"m{number},1,forward,2,3\n" for number in range(13))
    with pytest.raises(RecordError, match="13 timelines are too many"):
        read_timelines([write(tmp_path, lines)])
