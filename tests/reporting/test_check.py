from typing import Any

import pytest

from meft_reports.check import CheckResult, Kind, check
from meft_reports.frame import to_frame
from meft_reports.threshold import parse_threshold
from reporting.kinds import MakeRecord, Record


def verdict(expected: list[Record], got: list[Record], *limits: str) -> CheckResult:
    """The result of holding some records against others."""
    thresholds = [parse_threshold(limit) for limit in limits]
    return check(to_frame(got), to_frame(expected), thresholds)


@pytest.mark.parametrize(
    ("limit", "difference", "kinds"),
    [
        ("saved:0", 0, []),
        ("saved:0", 1, [Kind.REGRESSION]),
        ("saved:0", -1, [Kind.IMPROVED]),
        ("saved:5KiB", 5120, []),
        ("saved:5KiB", 5121, [Kind.REGRESSION]),
        ("saved:1%", 2**40 // 100, []),
        ("saved:1%", 2**40 // 100 + 1, [Kind.REGRESSION]),
        ("saved:1%", -(2**40 // 100) - 1, [Kind.IMPROVED]),
    ],
)
def test_a_byte_more_than_allowed_is_a_byte_more(
    make_record: MakeRecord, limit: str, difference: int, kinds: list[Kind]
) -> None:
    """At a terabyte as at a kilobyte."""
    before = make_record(saved_bytes=2**40)
    after = make_record(saved_bytes=2**40 + difference)
    result = verdict([before], [after], limit)
    assert [finding.kind for finding in result.findings] == kinds
    assert result.exit_code == (1 if Kind.REGRESSION in kinds else 0)
    assert result.num_compared == 1


def test_what_a_step_needs_above_what_rests_is_compared(
    make_record: MakeRecord,
) -> None:
    """It is derived, and has a threshold all the same."""
    before = make_record(peak_allocated_bytes=300, resting_bytes=200)
    after = make_record(peak_allocated_bytes=301, resting_bytes=200)
    result = verdict([before], [after], "peak_activation:0")
    assert [finding.kind for finding in result.findings] == [Kind.REGRESSION]
    assert verdict([before], [after], "peak_activation:1").exit_code == 0


def test_a_higher_score_is_better(make_record: MakeRecord) -> None:
    """The direction comes from the table of facts."""
    low, high = make_record(score=0.5), make_record(score=0.75)
    assert verdict([low], [high], "score:0.1").exit_code == 0
    assert verdict([high], [low], "score:0.1").exit_code == 1
    assert verdict([high], [low], "score:0.25").exit_code == 0


def test_without_a_better_direction_any_change_counts(make_record: MakeRecord) -> None:
    """Neither more nor fewer blocks is an improvement."""
    before = make_record(num_blocks=6)
    for blocks in (5, 7):
        result = verdict([before], [make_record(num_blocks=blocks)], "num_blocks:0")
        assert result.exit_code == 1


def test_a_finding_says_everything(make_record: MakeRecord) -> None:
    """Cell, column, expected, got, difference, allowed."""
    before, after = make_record(saved_bytes=1000), make_record(saved_bytes=3048)
    text = str(verdict([before], [after], "saved:1KiB"))
    assert text.splitlines() == [
        f"regression: {before['cell_id']} saved_bytes",
        "  expected   1,000 bytes (1000 B)",
        "  got        3,048 bytes (3.0 KiB)",
        "  difference +2,048 bytes (2.0 KiB)",
        "  allowed    1,024 bytes (1.0 KiB)",
        "1 cells in the baseline, 1 numbers compared: 1 regression",
    ]


@pytest.mark.parametrize(
    ("limit", "place", "words"),
    [
        ("saved:0", {"versions": {"torch": "2.14.0"}}, "torch_version 2.14.0"),
        ("saved:0", {"versions": {}}, "torch_version unknown"),
        ("saved:0", {"device_name": "A GPU"}, "device_name A GPU"),
        ("step_seconds:20%", {"machine": "Another"}, "machine Another"),
        ("step_seconds:20%", {"num_threads": 8}, "num_threads 8"),
        ("step_seconds:20%", {"num_slots": 2}, "num_slots 2"),
        ("score:0", {"weights_sha256": "cc"}, "weights_sha256 cc"),
        ("score:0", {"score_name": "f1"}, "f1"),
    ],
)
def test_what_may_not_be_compared_is_refused(
    make_record: MakeRecord, limit: str, place: dict[str, Any], words: str
) -> None:
    """Both values are said, and no verdict is given on the number."""
    result = verdict([make_record()], [make_record(**place)], limit)
    (finding,) = result.findings
    assert finding.kind == Kind.NOT_COMPARABLE
    assert finding.got == words
    assert finding.expected.split()[0] in (words.split()[0], "accuracy")
    assert (result.exit_code, result.num_compared) == (3, 0)


def test_bytes_are_compared_across_machines(make_record: MakeRecord) -> None:
    """The same torch saves the same bytes on any processor."""
    other = make_record(machine="Another CPU", num_threads=8)
    assert verdict([make_record()], [other], "saved:0").exit_code == 0


def test_times_of_cells_side_by_side_are_not_compared(make_record: MakeRecord) -> None:
    """They are comparable within their own run only."""
    record = make_record(num_slots=2)
    assert verdict([record], [record], "step_seconds:20%").exit_code == 3
    assert verdict([record], [record], "saved:0").exit_code == 0


@pytest.mark.parametrize("side", [0, 1, 2])
def test_null_is_never_passed_in_silence(make_record: MakeRecord, side: int) -> None:
    """Missing in the baseline, in the run, or in both: exit code 3."""
    seen, unseen = make_record(), make_record(saved_bytes=None)
    pair = [(unseen, seen), (seen, unseen), (unseen, unseen)][side]
    result = verdict([pair[0]], [pair[1]], "saved:0")
    assert result.exit_code == 3
    assert "null" in str(result)


def test_a_missing_cell_is_a_regression(make_record: MakeRecord) -> None:
    """A sweep that lost a cell does not pass."""
    both = [make_record(seed=0), make_record(seed=1)]
    result = verdict(both, both[:1], "saved:0")
    assert result.exit_code == 1
    assert [f.kind for f in result.findings] == [Kind.MISSING]


def test_a_new_cell_passes_and_is_said(make_record: MakeRecord) -> None:
    """It has nothing to be compared with yet."""
    both = [make_record(seed=0), make_record("oom", seed=1)]
    result = verdict(both[:1], both, "saved:0")
    assert result.exit_code == 0
    assert [f.kind for f in result.findings] == [Kind.NEW]


@pytest.mark.parametrize("status", ["oom", "timeout", "killed", "error", "skipped"])
def test_a_failed_cell_decides_the_exit_code(
    make_record: MakeRecord, status: str
) -> None:
    """Over a regression and an incomparable cell in the same run."""
    before = [make_record(seed=seed) for seed in range(3)]
    after = [
        make_record(seed=0, saved_bytes=2**40),
        make_record(status, seed=1),
        make_record(seed=2, versions={"torch": "1.0"}),
    ]
    assert verdict(before, after, "saved:0").exit_code == 4
    assert verdict(before[::2], after[::2], "saved:0").exit_code == 1


def test_a_baseline_without_an_ok_cell_proves_nothing(make_record: MakeRecord) -> None:
    """Nothing was compared, so nothing passed."""
    result = verdict([make_record("oom")], [make_record("oom")], "saved:0")
    assert result.exit_code == 3
