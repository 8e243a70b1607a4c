"""Numbers that may not be compared: both are said, and no verdict is given on them."""

from typing import Any

import pytest

from meft_reports.check import Kind
from meft_reports.columns import SCORE_NAMES
from meft_reports.frame import read_frame
from meft_reports.records import read_records
from reporting.kinds import MakeRecord, Write
from reporting.verdicts import verdict


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
        ("score:0", {"score_name": "f1"}, "score_name f1"),
        ("score:0", {"num_eval_rows": 7}, "num_eval_rows 7"),
        ("score:0", {"data_origin": None}, "data_origin unknown"),
        ("majority_score:0", {"score_name": "f1"}, "score_name f1"),
        ("majority_score:0", {"data_origin": "rows"}, "data_origin rows"),
        ("second_score:0", {"second_score_name": "f1"}, "second_score_name f1"),
        ("third_score:0", {"third_score_name": "f1"}, "third_score_name f1"),
        ("start_deviation:0", {"weights_sha256": "cc"}, "weights_sha256 cc"),
        ("step_ratio:20%", {"machine": "Another"}, "machine Another"),
        ("step_ratio_iqr:20%", {"num_slots": 2}, "num_slots 2"),
    ],
)
def test_what_may_not_be_compared_is_refused(
    make_record: MakeRecord, limit: str, place: dict[str, Any], words: str
) -> None:
    """Both values are said, and no verdict is given on the number."""
    seen = {
        "second_score": 0.5,
        "third_score": 0.5,
        "start_deviation": 0.1,
        "step_ratio": 1.0,
    }
    known: dict[str, Any] = seen | {"step_ratio_iqr": 0.1}
    before, after = make_record(**known), make_record(**(known | place))
    result = verdict([before], [after], limit)
    (finding,) = result.findings
    assert finding.kind == Kind.NOT_COMPARABLE
    assert finding.got == words
    assert finding.expected.split()[0] == words.split()[0]
    assert (result.exit_code, result.num_compared) == (3, 0)


def test_a_score_without_the_name_of_its_metric_is_not_comparable(
    make_record: MakeRecord,
) -> None:
    """On both sides: they may be of two metrics."""
    for name in ("score", "second_score", "third_majority_score"):
        record = make_record(**{name: 0.5, SCORE_NAMES[name]: None})
        result = verdict([record], [record], f"{name}:0")
        (finding,) = result.findings
        assert (finding.kind, result.exit_code) == (Kind.NOT_COMPARABLE, 3)
        assert finding.expected == finding.got == f"{SCORE_NAMES[name]} unknown"
        assert finding.advice == "a score of an unknown metric proves nothing"


def test_bytes_are_compared_across_machines(make_record: MakeRecord) -> None:
    """The same torch saves the same bytes on any processor."""
    other = make_record(machine="Another CPU", num_threads=8)
    assert verdict([make_record()], [other], "saved:0").exit_code == 0


def test_times_compare_where_as_many_cells_ran_side_by_side(
    make_record: MakeRecord,
) -> None:
    """Two and two as well as one and one; two and one are not comparable."""
    two, one = make_record(num_slots=2), make_record(num_slots=1)
    slower = make_record(num_slots=2, step_seconds=0.61)
    assert verdict([two], [two], "step_seconds:20%").exit_code == 0
    assert verdict([two], [slower], "step_seconds:20%").exit_code == 1
    assert verdict([two], [one], "step_seconds:20%").exit_code == 3
    assert verdict([two], [one], "saved:0").exit_code == 0


def test_cells_that_shared_a_gpu_have_no_times(
    make_record: MakeRecord, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even for others that shared one; their bytes and scores are as ever."""
    alone, shared = make_record(seed=0), make_record(seed=1)
    shared["environment"] = shared["environment"] | {"is_gpu_shared": True}
    path = write([alone, shared])
    (first, second), _ = read_records([path])
    assert first["measurement"] == alone["measurement"]
    times = ("step_seconds", "step_seconds_iqr", "all_step_seconds")
    assert second["measurement"] == alone["measurement"] | dict.fromkeys(times)
    said = capsys.readouterr().err
    assert "1 record of cells that shared their GPU, whose times are left out" in said
    frame = read_frame(path)
    assert list(frame["is_gpu_shared"]) == [False, True]
    assert list(frame["step_seconds"].isna()) == [False, True]
    result = verdict([second], [second], "step_seconds:20%")
    assert result.exit_code == 3
    assert verdict([second], [second], "saved:0").exit_code == 0


@pytest.mark.parametrize("side", [0, 1, 2])
def test_null_is_never_passed_in_silence(make_record: MakeRecord, side: int) -> None:
    """Missing in the baseline, in the run, or in both: exit code 3."""
    seen, unseen = make_record(), make_record(saved_bytes=None)
    pair = [(unseen, seen), (seen, unseen), (unseen, unseen)][side]
    result = verdict([pair[0]], [pair[1]], "saved:0")
    assert result.exit_code == 3
    assert "null" in str(result)


def test_one_name_for_two_cells_is_not_comparable(make_record: MakeRecord) -> None:
    """Numbers of two workloads say nothing of each other, whatever they are called."""
    before, after = make_record(), make_record()
    after["cell"] = after["cell"] | {"batch_size": 1}
    (finding,) = verdict([before], [after], "saved:0").findings
    assert finding.kind == Kind.NOT_COMPARABLE
    assert (finding.expected, finding.got) == ("batch_size 16", "batch_size 1")
    assert finding.advice == "two cells of one name; write the baseline again"


def test_other_code_versions_and_machines_are_said(make_record: MakeRecord) -> None:
    """They decide nothing, and are the first thing to look at."""
    there: dict[str, Any] = {
        "versions": {"torch": "2.13.0", "transformers": "5.24.0", "peft": "1"},
        "machine": "Another CPU",
        "code_sha256": "bb" * 32,
        "dirty": True,
    }
    before = [make_record(seed=seed) for seed in range(5)]
    after = [make_record(seed=seed, **there) for seed in range(4)]
    after.append(make_record("ok", seed=4, **(there | {"machine": "Third CPU"})))
    result = verdict(before, after, "saved:0")
    assert result.exit_code == 0
    assert list(result.notes) == [
        "note: code: aaaaaaaa in the baseline, bbbbbbbb in the runs (5 cells)",
        "note: machine: Example CPU in the baseline, Another CPU in the runs (4 cells);"
        " Example CPU in the baseline, Third CPU in the runs (1 cell)",
        "note: uncommitted changes: no in the baseline, yes in the runs (5 cells)",
        "note: version of peft: unknown in the baseline, 1 in the runs (5 cells)",
        "note: version of python: 3.11.9 in the baseline, unknown in the runs "
        "(5 cells)",
        "note: version of transformers: 5.23.0 in the baseline, 5.24.0 in the runs "
        "(5 cells)",
    ]
    assert all(note in str(result) for note in result.notes)
    assert verdict(before, before, "saved:0").notes == ()


def test_another_mean_of_losses_is_said(make_record: MakeRecord) -> None:
    """Weights that were trained by another mean score differently."""
    after = make_record(loss_mean="tokens", score_name="accuracy")
    (note,) = verdict([make_record()], [after], "score:0").notes
    assert note.startswith("note: what losses are averaged over: ")
    assert note.endswith(" in the baseline, tokens in the runs (1 cell)")


def test_what_may_not_be_compared_comes_with_advice(make_record: MakeRecord) -> None:
    """In words that say what to do, or why the numbers say nothing."""
    before = make_record(gradient_error=[0.1, 0.2])
    other = make_record(gradient_error=[0.1, 0.2], versions={"torch": "1.0"})
    shorter, broken = (
        make_record(gradient_error=errors) for errors in ([0.1], [None, None])
    )
    text = str(verdict([before], [other], "gradient_error:0"))
    assert text.splitlines()[:4] == [
        f"not comparable: {before['cell_id']} gradient_error",
        "  expected   torch_version 2.13.0",
        "  got        torch_version 1.0",
        "  make a baseline with the same torch_version, or run with that of the "
        "baseline; `meft-bench run SWEEP --force` runs what is done, too",
    ]
    (finding,) = verdict([before], [shorter], "gradient_error:0").findings
    assert (finding.expected, finding.got) == ("2 entries", "1 entries")
    assert finding.advice == "an entry that is missing proves nothing"
    (finding,) = verdict([broken], [broken], "gradient_error:0").findings
    assert (finding.expected, finding.got) == ("not finite", "not finite")
    assert finding.advice == "a number that is not finite proves nothing"
    unseen = make_record()
    (finding,) = verdict([before], [unseen], "gradient_error:0").findings
    assert (finding.expected, finding.got) == ("0.2", "null")
    assert finding.advice == "a number that was not measured proves nothing"


def test_bytes_do_not_depend_on_weights_or_rows(make_record: MakeRecord) -> None:
    """Only what is a share of something needs the same of both."""
    after = make_record(weights_sha256="cc", data_origin="rows", num_eval_rows=7)
    for limit in ("saved:0", "num_blocks:0", "step_seconds:0"):
        assert verdict([make_record()], [after], limit).exit_code == 0
    assert verdict([make_record()], [after], "trainable_fraction:0").exit_code == 0


def test_an_unknown_torch_is_not_the_same_torch(make_record: MakeRecord) -> None:
    """Neither side says which; an unknown accelerator is none on both."""
    unknown = make_record(versions={})
    (finding,) = verdict([unknown], [unknown], "saved:0").findings
    assert finding.kind == Kind.NOT_COMPARABLE
    assert (finding.expected, finding.got) == ("torch_version unknown",) * 2


def test_every_fact_that_is_said_has_a_name(make_record: MakeRecord) -> None:
    """A package that some cells lack is unknown there."""
    places = {"platform": "OS", "cpu": "CPU", "num_threads": 8, "num_slots": 2}
    versions = {"torch": "2.13.0", "python": "3.11.9", "transformers": "5.23.0"}
    after = [
        make_record(seed=0, prediction="a model", **places),
        make_record(seed=1, versions=versions | {"peft": "1"}),
    ]
    before = [make_record(seed=seed) for seed in (0, 1)]
    notes = verdict(before, after, "saved:0").notes
    assert [note.split(":")[1] for note in notes] == [
        " cells side by side",
        " platform",
        " processor",
        " threads per cell",
        " version of peft",
        " way of predicting",
    ]
    assert "unknown in the baseline, 1 in the runs (1 cell)" in notes[4]
    two = verdict(after, before, "saved:0").notes[4]
    assert two == (
        "note: version of peft: 1 in the baseline, unknown in the runs (1 cell)"
    )
    lacking = [after[1], make_record(seed=0, versions=versions)]
    having = [make_record(seed=s, versions=versions | {"peft": "1"}) for s in (0, 1)]
    (note,) = verdict(lacking, having, "saved:0").notes
    assert note == (
        "note: version of peft: unknown in the baseline, 1 in the runs (1 cell)"
    )


def test_predicted_times_do_not_depend_on_the_machine(make_record: MakeRecord) -> None:
    """They are computed from the data sheet of a GPU."""
    before = make_record(seconds_at_least=1.0)
    after = make_record(seconds_at_least=1.0, machine="Another", num_threads=8)
    result = verdict([before], [after], "seconds_at_least:0")
    assert (result.exit_code, result.num_compared) == (0, 1)
