"""Tables and figures of sparse adapters."""

import pandas as pd
import pytest

from meft_reports.errors import NothingDeclared
from meft_reports.plots import find_plot
from meft_reports.tables import find_tables


def test_transferred_bytes_are_next_to_both_formulas(traffic: pd.DataFrame) -> None:
    """10 MiB of the paper's 80, and of the 200 of a dense adapter that is offloaded."""
    tables = find_tables("traffic")(traffic)
    assert len(tables) == 2  # batch sizes are workloads
    for table in tables:
        assert [row[1] for row in table.rows] == ["1,024", "4,096"]
        for row in table.rows:
            found = dict(zip(table.header, row, strict=True))
            assert (found["up"], found["down"]) == ("6.0 MiB", "4.0 MiB")
            assert found["moved / paper's"] == "0.125"
            assert found["moved / dense offload's"] == "0.050"
            assert found["step ratio, median (IQR)"] == "0.500 (0.100) of dense"


def test_shares_are_of_all_blocks(traffic: pd.DataFrame) -> None:
    first = find_tables("traffic")(traffic)[0]
    shares = dict(zip(first.header, first.rows[0], strict=True))
    assert shares["share active in a batch, mean (least to most of a block)"] == (
        "15 % (10 % to 20 %)"
    )


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("traffic_neurons", 1),
        ("union_batch", 2),
        ("routing_recall", 4),
        ("activation_curve", 4),
    ],
)
def test_figures_have_a_line_per_setting(
    traffic: pd.DataFrame, name: str, lines: int
) -> None:
    figure = find_plot(name).draw(traffic)
    drawn = [line for axes in figure.axes for line in axes.get_lines()]
    assert len(drawn) >= lines
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


@pytest.mark.parametrize(
    "name", ["traffic_neurons", "union_batch", "routing_recall", "activation_curve"]
)
def test_without_sparse_adapters_there_is_nothing_to_draw(
    frame: pd.DataFrame, name: str
) -> None:
    with pytest.raises(NothingDeclared):
        find_plot(name).draw(frame)
