"""What is said of scores on questions: differences, and curves of sparse adapters."""

from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from meft_reports.errors import NothingDeclared
from meft_reports.frame import to_frame
from meft_reports.plots import find_plot
from meft_reports.style import look
from meft_reports.tables import find_tables
from meft_reports.tables.table import Table
from reporting.drawn import curves, horizontal
from reporting.kinds import MakeRecord


def row(table: Table, method: str, less: str) -> dict[str, str]:
    (found,) = [r for r in table.rows if r[:2] == (method, less)]
    return dict(zip(table.header, found, strict=True))


def interval(text: str) -> list[float]:
    return [float(end) for end in text.split(" to ")]


def test_a_difference_stands_with_both_its_intervals(knowledge: pd.DataFrame) -> None:
    """Held against scipy's paired interval, and rows by hand."""
    (table,) = find_tables("differences")(knowledge)
    found = row(table, "sparse (top_k_neurons=64)", "dense")
    assert found["seeds"] == "2"
    assert (found["score"], found["less its score"]) == ("0.500", "0.625")
    assert found["difference"] == "-0.125"
    over_seeds = stats.ttest_rel([0.25, 0.75], [0.5, 0.75]).confidence_interval(0.95)
    assert interval(found["interval over seeds"]) == pytest.approx(
        list(over_seeds), abs=1e-3
    )
    rows = np.array([0.0, -0.5, -0.5, 0.5])
    half = NormalDist().inv_cdf(0.975) * rows.std(ddof=1) / 2
    assert interval(found["interval over rows"]) == pytest.approx(
        [-0.125 - half, -0.125 + half], abs=1e-3
    )
    assert found["rows"] == "4"


def test_only_what_has_seeds_and_options_in_common_is_compared(
    make_record: MakeRecord, knowledge: pd.DataFrame
) -> None:
    """A twin is no method of its own; a method is not held against itself."""
    (table,) = find_tables("differences")(knowledge)
    assert len(table.rows) == 3  # pairs of three methods, K and experts of one seed not
    alone = [make_record(method=m, seed=0) for m in ("full", "lora")]
    assert find_tables("differences")(to_frame(alone)) == []
    other = [make_record(method="lora", seed=s, max_steps=80) for s in (0, 1)]
    full = [make_record(method="full", seed=s) for s in (0, 1)]
    assert find_tables("differences")(to_frame([*other, *full])) == []
    twins = [
        make_record(method=m, seed=s)
        for m in ("meft1-exact", "meft1-exact-store")
        for s in (0, 1)
    ]
    assert find_tables("differences")(to_frame(twins)) == []


def test_rows_count_only_where_the_score_is_their_share(
    make_record: MakeRecord,
) -> None:
    """A correlation is none, and older records do not know their rows."""
    records = [
        make_record(method=m, seed=s, score=score, right_rows=rows)
        for m, rows in (("full", [1, 0]), ("lora", None), ("head", [1, 1]))
        for s, score in ((0, 0.5), (1, 0.5))
    ]
    (table,) = find_tables("differences")(to_frame(records))
    for method, less in (("lora", "full"), ("lora", "head"), ("head", "full")):
        assert row(table, method, less)["interval over rows"] == "–"  # noqa: RUF001


def test_score_against_k_is_held_against_all_neurons(knowledge: pd.DataFrame) -> None:
    (axes,) = find_plot("score_top_k").draw(knowledge).axes
    its = look("sparse")
    assert curves(axes, its.color, its.marker) == [
        ([4, 16, 64], pytest.approx([0.3, 0.4, 0.5]))
    ]
    assert horizontal(axes, look("dense").color) == pytest.approx([0.625])


def test_chosen_experts_grow_along_with_their_number(
    knowledge: pd.DataFrame,
) -> None:
    """One line through cells that differ in both, of two seeds and of one."""
    (axes,) = find_plot("score_experts").draw(knowledge).axes
    its = look("sparse-experts")
    assert curves(axes, its.color, its.marker) == [
        ([16, 32, 128], pytest.approx([0.2, 0.2, 0.125]))
    ]
    assert horizontal(axes, look("sparse").color) == pytest.approx([0.5])
    assert horizontal(axes, look("dense").color) == pytest.approx([0.625])


def test_a_number_of_experts_by_rule_has_no_place(make_record: MakeRecord) -> None:
    records = [
        make_record(method="sparse-experts", num_experts=experts) for experts in (0, 16)
    ]
    with pytest.raises(NothingDeclared):
        find_plot("score_experts").draw(to_frame(records))
