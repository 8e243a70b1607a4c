import math

import pandas as pd
import pytest

from meft_reports.frame import to_frame
from meft_reports.tables import find_tables
from meft_reports.tables.table import Table
from reporting.kinds import MakeRecord

NOTHING = "–"  # noqa: RUF001


def rows(table: Table) -> list[dict[str, str]]:
    """Rows by the names of their columns."""
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def test_a_ratio_is_taken_against_checkpoints_of_the_same_weights(
    depth: pd.DataFrame,
) -> None:
    """bf16 weights keep bf16 checkpoints, half as large; the titles say which."""
    bf16, fp32 = find_tables("ratios")(depth)
    assert bf16.title.startswith("Against bf16 checkpoints of adapters-checkpointing")
    assert fp32.title.startswith("Against fp32 checkpoints of adapters-checkpointing")
    found = []
    for table in (bf16, fp32):
        (row,) = [r for r in rows(table) if (r["blocks"], r["k"]) == ("12", "2")]
        assert row["saved for backward"] == "12.0 MiB"
        found.append((row["the reference saves"], row["saved ratio"]))
    assert found == [("24.0 MiB", "0.500"), ("48.0 MiB", "0.250")]
    assert "see bf16 weights" in " ".join(fp32.notes)
    assert "see bf16 weights" not in " ".join(bf16.notes)


def test_checkpoints_of_quantised_weights_are_of_the_compute_dtype(
    make_record: MakeRecord,
) -> None:
    """The title says how weights are quantised, and that checkpoints are not."""
    shape = {"task": "synthetic", "dtype": "bf16", "weights_dtype": "nf4"}
    names = ("adapters-checkpointing", "meft1-exact")
    records = [make_record(method=name, saved_bytes=2**20, **shape) for name in names]
    (table,) = find_tables("ratios")(to_frame(records))
    assert table.title.startswith("Against bf16 checkpoints of adapters-checkpointing")
    assert "nf4 weights" in table.title
    assert "checkpoints are bf16" in " ".join(table.notes)


def test_a_peak_ratio_leaves_out_model_state(depth: pd.DataFrame) -> None:
    """8 of the 10 MiB that are not saved are model state, so 2 are above it."""
    table = find_tables("ratios")(depth)[0]
    (row,) = [r for r in rows(table) if (r["blocks"], r["k"]) == ("6", "4")]
    assert row["peak activation"] == row["the reference's peak"] == "14.0 MiB"
    assert row["peak ratio"] == "1.000"


def test_a_step_ratio_is_never_made_of_two_processes(
    make_record: MakeRecord,
) -> None:
    """Both have a time of a step, but no ratio, unless their steps were interleaved."""
    reference = make_record(task="synthetic", method="adapters-checkpointing")
    for its in ({}, {"reference": "lora-checkpointing", "step_ratio": 2.0}):
        ours = make_record(task="synthetic", method="meft1", **its)
        (table,) = find_tables("ratios")(to_frame([reference, ours]))
        assert rows(table)[0]["step ratio, median (IQR)"] == NOTHING


def test_steps_interleaved_with_the_reference_give_median_and_spread(
    depth: pd.DataFrame,
) -> None:
    """As the cell that measured them says."""
    found = {
        row["step ratio, median (IQR)"]
        for row in rows(find_tables("ratios")(depth)[0])
        if row["k"] == "2"
    }
    assert found == {"1.200 (0.100)"}


def test_a_failed_cell_stands_in_place_of_its_bytes(depth: pd.DataFrame) -> None:
    """And takes nothing from the others."""
    table = find_tables("ratios")(depth)[0]
    (row,) = [r for r in rows(table) if r["blocks"] == "24"]
    assert row["saved for backward"] == "oom"
    assert row["the reference saves"] == row["saved ratio"] == NOTHING


def test_a_reference_of_another_width_is_no_reference(make_record: MakeRecord) -> None:
    """Adapters of 64 keep more than those of 8."""
    wide = {"method": "adapters-checkpointing", "bottleneck_size": 64}
    records = [make_record(task="synthetic", **wide)]
    records.append(make_record(task="synthetic", method="meft1"))
    (table,) = find_tables("ratios")(to_frame(records))
    assert rows(table)[0]["the reference saves"] == NOTHING


def test_an_error_without_bounds_is_not_called_unmeasured(
    make_record: MakeRecord,
) -> None:
    """A dash means that nothing was measured."""
    errors = [math.nan, 1.0]
    record = make_record(method="meft1", gradient_error=errors)
    (table,) = find_tables("exactness")(to_frame([record]))
    assert rows(table)[0]["worst gradient error"] == "not finite"
    assert rows(table)[0]["worst reconstruction error"] == NOTHING


def test_exact_twins_agree_in_every_digit_and_float_ones_until_a_step(
    quality: pd.DataFrame,
) -> None:
    """Over seeds, for every number of rebuilt blocks, next to both scores."""
    (table,) = find_tables("twins")(quality)
    found = {row["method"]: row for row in rows(table)}
    assert list(found) == [
        "meft1 (rebuilt=all)",
        "meft1 (rebuilt=2)",
        "meft1-exact (k=2, rebuilt=all)",
        "meft1-exact (k=4, rebuilt=all)",
        "meft1-exact (k=4, rebuilt=2)",
    ]
    for name, row in found.items():
        exact = "exact" in name
        assert row["runs equal in every step"] == ("2 of 2" if exact else "0 of 2")
        losses = "8 of 8" if exact else "6 of 8"
        assert row["losses equal in every digit"] == losses
        assert row["first step that differs"] == (NOTHING if exact else "3")
    row = found["meft1 (rebuilt=2)"]
    assert row["score, rebuilt"] == "0.810 ± 0.014"
    assert row["score, stored"] == "0.830 ± 0.014"


@pytest.mark.parametrize(
    "difference",
    [
        {"seed": 1},
        {"learning_rate": 1e-5},
        {"lost_bits": 2},
        {"machine": "Another CPU"},
        {"dtype": "bf16"},
    ],
)
def test_cells_that_differ_in_more_are_no_twins(
    make_record: MakeRecord, difference: dict[str, object]
) -> None:
    """Equal losses of two different runs would prove nothing."""
    records = [
        make_record(method="meft1-exact"),
        make_record(method="meft1-exact-store", **difference),
    ]
    assert find_tables("twins")(to_frame(records)) == []


def test_a_step_that_only_one_twin_made_is_a_difference(
    make_record: MakeRecord,
) -> None:
    """Two runs that stop at different steps are not the same run."""
    records = [
        make_record(method="meft1-exact", loss_curve=[1.0, 0.5]),
        make_record(method="meft1-exact-store", loss_curve=[1.0, 0.5, 0.25]),
    ]
    (table,) = find_tables("twins")(to_frame(records))
    (row,) = rows(table)
    assert row["losses equal in every digit"] == "2 of 3"
    assert row["first step that differs"] == "3"


def test_the_start_has_k_across_and_the_papers_scales_next_to_it(
    quality: pd.DataFrame,
) -> None:
    """Twins share a row; a float method has no k."""
    (table,) = find_tables("start")(quality)
    assert table.header == ("method", "blocks", "the paper's scales", "k=2", "k=4")
    assert table.rows == (
        ("meft1", "6", "2.5e-01", NOTHING, NOTHING),
        ("meft1-exact", "6", NOTHING, "2.5e-01", "6.2e-02"),
    )


@pytest.mark.parametrize("kind", ["ratios", "exactness"])
def test_how_long_steps_are_timed_is_no_setting_of_a_method(
    make_record: MakeRecord, kind: str
) -> None:
    """Cells of one method that were timed for longer stand under the same name."""
    shape: dict[str, object] = {"task": "synthetic", "gradient_error": [0.0]}
    records = [
        make_record(method="adapters-checkpointing", task="synthetic"),
        make_record(method="meft1-exact", lost_bits=2, max_steps=3, **shape),
        make_record(method="meft1-exact", lost_bits=4, max_steps=9, **shape),
    ]
    (table,) = find_tables(kind)(to_frame(records))
    names = {row["method"] for row in rows(table)} - {"adapters-checkpointing"}
    assert not any("max_steps" in name for name in names)
