"""Tables of predictions of memory that others measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from meft_reports import cli, published
from meft_reports.errors import RecordError


def figure(**changes: Any) -> dict[str, Any]:
    return {
        "case": "lora 512",
        "quantity": "max_memory_allocated",
        "value": 1010,
        "measured": 1000,
        "source": "peft",
        "url": "https://example.com",
        "note": "of the run",
        "is_calibration": False,
        "estimates": {},
    } | changes


def written(tmp_path: Path, *figures: dict[str, Any], **changes: Any) -> Path:
    path = tmp_path / "run.checks.jsonl"
    line = {"status": "ok", "device_name": "NVIDIA L40S", "figures": list(figures)}
    path.write_text(json.dumps(line | changes) + "\n")
    return path


def test_errors_are_summarised_per_view_and_source(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        figure(),
        figure(case="lora 1024", value=970),
        figure(quantity="memory_reserved", value=1100),
        figure(case="fitted", value=5000, is_calibration=True),
    )
    summary, every = published.tables(published.read([path]))
    assert summary.rows[0][:6] == ("all", "–", "allocated", "2", "2.00 %", "-1.00 %")  # noqa: RUF001
    assert summary.rows[0][7:] == ("-3.00 %", "lora 1024")
    assert summary.rows[1][2:5] == ("reserved", "1", "10.00 %")
    assert [row[2] for row in summary.rows[2:]] == [
        "max_memory_allocated",
        "memory_reserved",
    ]
    assert every.rows[0][1] == "fitted"
    assert every.rows[0][6] == "+400.00 % (fitted)"
    assert len(every.rows) == 4


def test_other_estimators_are_compared_on_what_they_answer(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        figure(estimates={"good 1": 1020, "bad 2": 400, "silent 3": None}),
        figure(case="lora 1024", estimates={"good 1": None, "bad 2": 500}),
    )
    _, others, _ = published.tables(published.read([path]))
    assert [row[0] for row in others.rows] == ["this suite", "good 1", "bad 2"]
    assert others.rows[1][1:4] == ("1", "2.00 %", "1")
    assert others.rows[2][1:] == ("2", "55.00 %", "0", "-60.00 %", "-50.00 %", "1.00 %")


def test_the_newest_number_counts_and_failed_runs_do_not(tmp_path: Path) -> None:
    path = written(tmp_path, figure())
    old = path.read_text()
    new = old.replace("1010", "1030")
    failed = old.replace('"ok"', '"error"').replace("1010", "9999")
    path.write_text(old + new + failed + '{"status": "o')
    (number,) = published.read([path])
    assert number.predicted == 1030


def test_numbers_that_were_fitted_alone_have_no_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (every,) = published.tables(
        published.read([written(tmp_path, figure(is_calibration=True))])
    )
    assert len(every.rows) == 1
    path = written(tmp_path, status="error")
    assert cli.main(["table", "predictions", str(path)]) == 0
    assert "needs a file of checks with ok runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"status": "ok"}',
        json.dumps({"status": "ok", "device_name": "x", "figures": [{"measured": 1}]}),
        json.dumps(
            {"status": "ok", "device_name": "x", "figures": [figure(measured=0)]}
        ),
        json.dumps(
            {"status": "ok", "device_name": "x", "figures": [figure(value=True)]}
        ),
        json.dumps({"status": "ok", "device_name": [], "figures": [figure()]}),
        "no JSON",
    ],
)
def test_other_lines_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.checks.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(RecordError, match=r"a\.checks\.jsonl, line 1: not a check"):
        published.read([path])


def test_only_one_table_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, figure())
    assert cli.main(["table", "predictions", str(path)]) == 0
    assert "memory that others measured" in capsys.readouterr().out
    assert cli.main(["table", "results", str(path)]) == 2
    assert "`table predictions` and `page` read" in capsys.readouterr().err
    assert cli.main(["page", str(path), "-o", str(tmp_path / "a.html")]) == 2
    assert not (tmp_path / "a.html").exists()
