"""What a run is held to, and the verdict."""

from typing import Any

import pytest

from meft_reports.check import Kind
from reporting.kinds import MakeRecord
from reporting.verdicts import verdict


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


def test_what_a_step_needs_above_model_state_is_compared(
    make_record: MakeRecord,
) -> None:
    """It is derived, and has a threshold all the same."""
    before = make_record(peak_allocated_bytes=300, model_state_bytes=200)
    after = make_record(peak_allocated_bytes=301, model_state_bytes=200)
    result = verdict([before], [after], "peak_activation:0")
    assert [finding.kind for finding in result.findings] == [Kind.REGRESSION]
    assert verdict([before], [after], "peak_activation:1").exit_code == 0


def test_a_higher_score_is_better(make_record: MakeRecord) -> None:
    """The direction comes from the table of facts."""
    low, high = make_record(score=0.5), make_record(score=0.75)
    assert verdict([low], [high], "score:0.1").exit_code == 0
    assert verdict([high], [low], "score:0.1").exit_code == 1
    assert verdict([high], [low], "score:0.25").exit_code == 0


@pytest.mark.parametrize(
    ("before", "after", "limit", "code"),
    [
        (0.5, 0.49, "0.01", 0),
        (0.5, 0.4899999999999999, "0.01", 1),
        (0.3, 0.2, "0.1", 0),
        (0.9, 0.81, "10%", 0),
        (0.9, 0.8099999999999999, "10%", 1),
        (1e-7, 0.0, "1e-7", 0),
    ],
)
def test_a_drop_of_what_is_allowed_is_allowed(
    make_record: MakeRecord, before: float, after: float, limit: str, code: int
) -> None:
    """In the decimal numbers of record and threshold: 0.5 - 0.01 is 0.49, whatever
    floats lie next to them."""
    pair = make_record(score=before), make_record(score=after)
    result = verdict([pair[0]], [pair[1]], f"score:{limit}")
    assert result.exit_code == code
    lists = [make_record(routing_recall=[score, 1.0]) for score in (before, after)]
    assert verdict(lists[:1], lists[1:], f"routing_recall:{limit}").exit_code == code


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
        "  difference +2,048 bytes (2.0 KiB), +204.80 %",
        "  allowed    1,024 bytes (1.0 KiB)",
        "1 cells in the baseline, 1 numbers compared: 1 regression",
    ]


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


def test_a_cell_that_ran_with_older_code_only_is_missing(
    make_record: MakeRecord,
) -> None:
    """That it once ended well says nothing of the code that is checked."""
    before = [make_record(seed=0), make_record(seed=1)]
    stale = make_record(seed=0, started_at="2026-01-01T00:00:00Z", code_sha256="old!")
    result = verdict(before, [stale, before[1]], "saved:0")
    (finding,) = result.findings
    assert (finding.kind, result.exit_code) == (Kind.MISSING, 1)
    assert finding.expected == "an ok cell with the newest code of the runs"
    assert finding.got == "an ok cell with older code, old!, of 2026-01-01T00:00:00Z"
    assert finding.advice == (
        "run the whole sweep with one code; `meft-bench run SWEEP --force` runs what "
        "is done, too"
    )


def test_a_cell_that_last_failed_with_older_code_has_failed(
    make_record: MakeRecord,
) -> None:
    """What is known of it last is that it failed."""
    before = [make_record(seed=0), make_record(seed=1)]
    stale = make_record(
        "oom", seed=0, started_at="2026-01-01T00:00:00Z", code_sha256="old"
    )
    assert verdict(before, [stale, before[1]], "saved:0").exit_code == 4


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ([0.1, 0.2], [0.2, 0.1], None),
        ([0.1, 0.2], [0.2, 0.2], None),
        ([0.1, 0.2], [0.1, 0.25], Kind.REGRESSION),
        ([0.1, 0.2], [0.0, 0.1], Kind.IMPROVED),
        ([0.0, 0.0], [0.0, 0.0], None),
        ([0.0, 0.0], [0.0, 1e-300], Kind.REGRESSION),
        ([0.1, 0.2], [0.1, None], Kind.REGRESSION),
        ([0.1, None], [0.1, 0.2], Kind.IMPROVED),
        ([0.1, None], [0.1, None], Kind.NOT_COMPARABLE),
        ([0.1, 0.2], [0.2], Kind.NOT_COMPARABLE),
        ([0.1, 0.2], [], Kind.NOT_COMPARABLE),
        ([], [0.1, 0.2], Kind.NOT_COMPARABLE),
        ([0.1, 0.2], None, Kind.NOT_COMPARABLE),
        (None, [0.1, 0.2], Kind.NOT_COMPARABLE),
    ],
)
@pytest.mark.parametrize("name", ["gradient_error", "reconstruction_error"])
def test_a_list_is_compared_by_its_worst_entry(
    make_record: MakeRecord, name: str, before: Any, after: Any, kind: Kind | None
) -> None:
    """An entry that was not finite is worse than any, and a missing one is no entry."""
    pair = [make_record(**{name: errors}) for errors in (before, after)]
    result = verdict(pair[:1], pair[1:], f"{name}:10%")
    assert [f.kind for f in result.findings] == ([] if kind is None else [kind])


def test_an_error_that_is_not_finite_is_said(make_record: MakeRecord) -> None:
    """What was expected and allowed is a number, what was found is none."""
    before = make_record(gradient_error=[0.5, 0.25])
    after = make_record(gradient_error=[0.5, None])
    (finding,) = verdict([before], [after], "gradient_error:20%").findings
    assert finding.kind == Kind.REGRESSION
    assert (finding.expected, finding.got) == ("0.5", "not finite")
    assert (finding.difference, finding.allowed) == ("", "0.1")
    (back,) = verdict([after], [before], "gradient_error:20%").findings
    assert (back.kind, back.expected, back.got) == (Kind.IMPROVED, "not finite", "0.5")
    assert (back.difference, back.allowed) == ("", "")
    assert back.advice == "consider updating the baseline"


def test_of_a_list_where_more_is_better_the_least_counts(
    make_record: MakeRecord,
) -> None:
    """One block whose router leads astray is a regression."""
    before = make_record(routing_recall=[0.5, 0.75])
    after = make_record(routing_recall=[0.25, 1.0])
    result = verdict([before], [after], "routing_recall:0.1")
    assert [f.kind for f in result.findings] == [Kind.REGRESSION]
    assert result.findings[0].difference == "-0.25"
    assert verdict([after], [before], "routing_recall:0.1").exit_code == 0


@pytest.mark.parametrize("limit", ["h2d:5%", "h2d:0", "h2d:0%", "h2d:99%"])
def test_any_share_of_zero_is_zero(make_record: MakeRecord, limit: str) -> None:
    """One byte where there was none is beyond every share."""
    nothing, a_byte = make_record(h2d_bytes=0), make_record(h2d_bytes=1)
    assert verdict([nothing], [nothing], limit).exit_code == 0
    assert verdict([nothing], [a_byte], limit).exit_code == 1


def test_numbers_that_look_alike_are_written_out(make_record: MakeRecord) -> None:
    """A finding never says that a number was expected and got."""
    before, after = make_record(score=0.5), make_record(score=0.4999999999)
    (finding,) = verdict([before], [after], "score:0").findings
    assert (finding.expected, finding.got) == ("0.5", "0.4999999999")
    assert finding.difference == "-1e-10"


def test_many_differences_of_one_fact_are_counted(make_record: MakeRecord) -> None:
    """Three are said, however many there are."""
    before = [make_record(seed=seed) for seed in range(5)]
    after = [make_record(seed=seed, platform=f"OS {seed}") for seed in range(5)]
    (note,) = verdict(before, after, "saved:0").notes
    assert note.endswith("OS 2 in the runs (1 cell); 2 more")
    (note,) = verdict(before[:4], after[:4], "saved:0").notes
    assert note.endswith("OS 2 in the runs (1 cell); 1 more")
    (note,) = verdict(before[:3], after[:3], "saved:0").notes
    assert note.endswith("OS 2 in the runs (1 cell)")


def test_a_baseline_says_how_many_of_its_cells_hold_nothing(
    make_record: MakeRecord,
) -> None:
    """A cell that failed in the baseline is held to nothing."""
    before = [make_record(seed=0), make_record("oom", seed=1)]
    after = [make_record(seed=0), make_record("error", seed=1)]
    result = verdict(before, after, "saved:0")
    assert result.notes == ("note: the baseline holds 1 cell not ok",)
    (finding,) = result.findings
    assert (finding.kind, finding.got) == (Kind.NEW, "error: made-up error")


def test_a_verdict_sums_up_in_one_line(make_record: MakeRecord) -> None:
    """Each kind of finding is counted, and so is what was compared."""
    before = [make_record(seed=seed) for seed in range(4)]
    after = [
        make_record("killed", seed=0),
        make_record(seed=1, saved_bytes=7),
        make_record(seed=2, saved_bytes=8),
        make_record(seed=5),
    ]
    last = str(verdict(before, after, "saved:0", "model_state:0")).splitlines()[-1]
    assert last == (
        "4 cells in the baseline, 4 numbers compared: 1 failed, 1 missing, 2 improved, "
        "1 new"
    )
    fine = str(verdict(before, before, "saved:0")).splitlines()
    assert fine == [
        "4 cells in the baseline, 4 numbers compared: no difference beyond what is "
        "allowed"
    ]


def test_every_cell_of_a_baseline_is_looked_at(make_record: MakeRecord) -> None:
    """Also those after a missing, a failed or an incomparable one; the worst first."""
    before = [make_record(seed=seed) for seed in range(5)]
    after = [
        make_record("oom", seed=1),
        make_record(seed=2, versions={"torch": "1.0"}),
        make_record(seed=3, saved_bytes=2**40),
        make_record("error", seed=4),
    ]
    result = verdict(before, after, "saved:0")
    assert [finding.kind for finding in result.findings] == [
        Kind.FAILED,
        Kind.FAILED,
        Kind.REGRESSION,
        Kind.MISSING,
        Kind.NOT_COMPARABLE,
    ]


def test_a_small_difference_has_its_sign(make_record: MakeRecord) -> None:
    """Less than one second more is more."""
    before, after = make_record(step_seconds=0.5), make_record(step_seconds=0.75)
    (finding,) = verdict([before], [after], "step_seconds:0").findings
    assert finding.difference == "+0.25 s, +50.00 %"
    (finding,) = verdict([after], [before], "step_seconds:0").findings
    assert finding.difference == "-0.25 s, -33.33 %"


def test_a_byte_counts_beyond_the_precision_of_floats(make_record: MakeRecord) -> None:
    """2^53 + 1 is no float."""
    before, after = (make_record(saved_bytes=2**53 + more) for more in (0, 1))
    assert verdict([before], [after], "saved:0").exit_code == 1


def test_every_finding_says_what_was_expected(make_record: MakeRecord) -> None:
    """In words, where there is no number."""
    before = [make_record(seed=seed) for seed in range(3)]
    after = [
        make_record("oom", seed=1),
        make_record(seed=2, score_name="f1"),
        make_record(seed=3),
    ]
    found = {
        finding.kind: finding for finding in verdict(before, after, "score:0").findings
    }
    said = {
        kind: (finding.expected, finding.got, finding.advice)
        for kind, finding in found.items()
    }
    assert said == {
        Kind.MISSING: (
            "an ok cell, as in the baseline",
            "no such cell in the runs",
            "run the whole sweep, or update the baseline if the cell was removed",
        ),
        Kind.FAILED: ("ok", "oom: made-up oom", ""),
        Kind.NOT_COMPARABLE: (
            "score_name accuracy",
            "score_name f1",
            "another metric",
        ),
        Kind.NEW: ("not in the baseline", "ok", ""),
    }
    nothing, _ = verdict([make_record("oom")], [make_record("oom")], "score:0").findings
    assert nothing.cell_id == "all cells"
    assert nothing.expected == "at least one ok cell in the baseline"
    assert nothing.got == "none"
    assert nothing.advice == "write one with meft-report baseline"


def test_the_worst_finding_is_the_first(make_record: MakeRecord) -> None:
    """By its share of what was before, not by its size."""
    before = [make_record(seed=0, saved_bytes=1000), make_record(seed=1)]
    after = [make_record(seed=0, saved_bytes=2000)]
    after.append(
        make_record(seed=1, saved_bytes=before[1]["measurement"]["saved_bytes"] + 10**6)
    )
    first, second = verdict(before, after, "saved:0").findings
    assert (first.cell_id, second.cell_id) == tuple(r["cell_id"] for r in before)
