"""Cells that shared their GPU with processes of others."""

from pathlib import Path
from typing import Any

import pytest

from meft_reports.check import check
from meft_reports.compare import compare
from meft_reports.contaminated import SHARED
from meft_reports.format import NOTHING
from meft_reports.frame import read_frame, to_frame
from meft_reports.page.caveats import caveats_of
from meft_reports.page.cells import all_cells
from meft_reports.records import read_all
from meft_reports.tables import find_tables
from meft_reports.threshold import parse_threshold
from reporting.kinds import MakeRecord, Write

MIB = 2**20
WARNING = "contaminated: another process was on the GPU"


@pytest.fixture
def contaminated(make_record: MakeRecord) -> dict[str, Any]:
    """A record of a cell that was not alone on its GPU."""
    return make_record(
        device="cuda",
        message=WARNING,
        num_foreign_processes=1,
        peak_allocated_bytes=300,
        nvml_process_bytes=900,
        pcie_rx_bytes=500,
        step_energy_joules=20.0,
    )


def test_what_others_change_is_left_out_and_what_is_the_cells_own_stays(
    contaminated: dict[str, Any], write: Write
) -> None:
    """Of a cell that was alone, or where it is unknown, nothing is left out."""
    (row,) = read_frame(write([contaminated])).to_dict("records")
    assert row["peak_allocated_bytes"] == 300
    assert row["nvml_process_bytes"] == 900
    assert row["score"] == 0.9
    for name in ("step_seconds", "pcie_rx_bytes", "step_energy_joules"):
        assert name in SHARED
        assert row[name] is None or row[name] != row[name] or str(row[name]) == "<NA>"
    for number in (0, None):
        contaminated["measurement"] |= {"num_foreign_processes": number}
        contaminated["measurement"]["step_seconds"] = 0.5
        (row,) = read_frame(write([contaminated])).to_dict("records")
        assert row["step_seconds"] == 0.5


def test_the_page_has_a_caveat_that_names_the_cells(
    contaminated: dict[str, Any], make_record: MakeRecord
) -> None:
    """And does not take the warning for one about the loss."""
    frame = to_frame([contaminated, make_record(method="lora", device="cuda")])
    caveats = caveats_of(all_cells(frame), [])
    its = {caveat.title: caveat for caveat in caveats}
    caveat = its["1 cell contaminated by others on the GPU"]
    (index,) = caveat.cells
    assert frame["num_foreign_processes"][index] == 1
    assert not [title for title in its if "loss was not finite" in title]


def test_a_check_of_its_times_is_not_comparable(
    contaminated: dict[str, Any], make_record: MakeRecord, write: Write
) -> None:
    """Its allocated bytes are compared as ever."""
    clean = make_record(device="cuda", peak_allocated_bytes=300)
    found = check(
        read_frame(write([contaminated])),
        to_frame([clean]),
        [parse_threshold("step_seconds:10%"), parse_threshold("peak_allocated:0")],
    )
    (finding,) = found.findings
    assert (finding.kind, finding.column) == ("not comparable", "step_seconds")
    assert "run the cell again on a free one" in finding.advice
    assert [one.column.name for one in found.compared] == ["peak_allocated_bytes"]


def test_a_comparison_says_why_a_time_is_missing(
    contaminated: dict[str, Any], make_record: MakeRecord, write: Write
) -> None:
    clean = make_record(device="cuda", peak_allocated_bytes=300)
    path: Path = write([contaminated])
    found = compare([clean], read_all([path]))
    endings = {one.before: one.after for one in found.endings}
    assert endings["step_seconds 0.5 s"] == (
        "contaminated by another process on the GPU"
    )


def test_tables_of_the_meters_are_side_by_side(make_record: MakeRecord) -> None:
    """Memory, traffic and power of one workload; a dash where nothing was measured."""
    measured: Any = {"device": "cuda", "h2d_bytes": 6 * MIB, "pcie_source": "counters"}
    measured |= {"profiled_h2d_bytes": 7 * MIB, "pcie_rx_bytes": 8 * MIB}
    measured |= {"context_bytes": 500 * MIB, "step_energy_joules": 175.0}
    measured |= {"mean_power_watts": 350.0, "throttle_reasons": "power cap"}
    tables = find_tables("meters")(to_frame([make_record(**measured)]))
    rows = [dict(zip(table.header, *table.rows, strict=True)) for table in tables]
    memory, traffic, power = rows
    assert (memory["context"], memory["process"]) == ("500.0 MiB", NOTHING)
    ups = [traffic[f"up: {meter}"] for meter in ("ledger", "profiler", "link")]
    assert ups == ["6.0 MiB", "7.0 MiB", "8.0 MiB"]
    assert (power["energy of a step"], power["mean power"]) == ("175 J", "350 W")
    assert power["clocks lowered by"] == "power cap"
    assert "measured by counters." in tables[1].notes[0]


def test_a_table_of_meters_notes_a_contaminated_cell(
    contaminated: dict[str, Any], write: Write
) -> None:
    tables = find_tables("meters")(read_frame(write([contaminated])))
    for table in tables:
        assert "contaminated" in table.notes[1]
    (row,) = tables[2].rows
    named = dict(zip(tables[2].header, row, strict=True))
    assert (named["step"], named["energy of a step"]) == (NOTHING, NOTHING)
    assert named["foreign processes"] == "1"


def test_energy_of_two_machines_is_not_compared(make_record: MakeRecord) -> None:
    """As little as times."""
    one = make_record(step_energy_joules=20.0)
    other = make_record(step_energy_joules=20.0, machine="NVIDIA H200")
    limits = [parse_threshold("step_energy_joules:1%")]
    (finding,) = check(to_frame([other]), to_frame([one]), limits).findings
    assert finding.kind == "not comparable"
    assert finding.got == "machine NVIDIA H200"


def test_energy_power_and_clocks_have_their_units(make_record: MakeRecord) -> None:
    """In findings, as on the page."""
    clean = make_record(step_energy_joules=20.0, mean_power_watts=350.5)
    worse = make_record(step_energy_joules=30.0, mean_power_watts=350.5)
    found = check(
        to_frame([worse]), to_frame([clean]), [parse_threshold("step_energy_joules:1%")]
    )
    (finding,) = found.findings
    assert (finding.expected, finding.got) == ("20 J", "30 J")
