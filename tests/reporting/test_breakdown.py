"""What of the memory grew, from the breakdowns of two records."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from meft_reports.breakdown import Breakdown, read, what_grew
from meft_reports.cli import main
from meft_reports.errors import RecordError
from reporting.kinds import MakeRecord

MIB = 2**20
FROZEN = ["frozen", "", "layer.*.dense", "", "float32", [512, 512], 2 * MIB, 2, 0]
SAVED = ["saved", "forward", "layer.*", "aten.mm.default", "int32", [64], MIB, 2, 30]


def peak(*rows: list[Any], phase: str = "backward", other: int = 7) -> dict[str, Any]:
    """A breakdown in JSON."""
    return {
        "peak_bytes": sum(row[6] for row in rows) + other,
        "at_op": 40,
        "num_ops": 99,
        "phase": phase,
        "rows": [*rows],
        "other_bytes": other,
        "saved_bytes": sum(row[6] for row in rows if row[0] == "saved"),
        "saved_rows": [row for row in rows if row[0] == "saved"],
        "saved_other_bytes": 0,
    }


def of(*rows: list[Any], **others: Any) -> Breakdown:
    return read(peak(*rows, **others), "here")


def changed(row: list[Any], **changes: Any) -> list[Any]:
    names = "kind phase module operator dtype shape num_bytes num first".split()
    return [changes.get(name, value) for name, value in zip(names, row, strict=True)]


def lines(before: Breakdown, after: Breakdown) -> list[str]:
    difference = after.peak_bytes - before.peak_bytes
    return what_grew(before, after, difference).lines(5)


def test_what_grew_is_blamed_on_its_kind_module_and_shape() -> None:
    more = changed(SAVED, num_bytes=2 * MIB, shape=[128], first=31)
    assert lines(of(FROZEN, SAVED), of(FROZEN, more)) == [
        "+1.0 MiB  saved  in forward  layer.*  aten.mm.default  int32 [64] → "
        "int32 [128]",
        "first: operator 31, aten.mm.default of layer.* in forward",
    ]
    assert lines(of(FROZEN, SAVED), of(FROZEN, SAVED)) == []


def test_another_name_of_an_operator_is_no_growth() -> None:
    """Versions of torch name some differently."""
    other = changed(SAVED, operator="aten.linear.default")
    assert lines(of(FROZEN, SAVED), of(FROZEN, other)) == []


def test_memory_of_another_kind_is_moved() -> None:
    """Weights that are trained now are as large as before; their state is new."""
    trained = changed(FROZEN, kind="parameters")
    state = changed(FROZEN, kind="optimizer", num_bytes=4 * MIB, num=4)
    assert lines(of(FROZEN, SAVED), of(trained, SAVED, state)) == [
        "+4.0 MiB  +4x  optimizer  layer.*.dense  float32 [512, 512]"
    ]


def test_another_phase_is_said_first_and_what_is_left_last() -> None:
    after = of(FROZEN, phase="update", other=7 + 300)
    first, *_, last = lines(of(FROZEN, SAVED), after)
    assert first == "the peak was in backward, and is in update now"
    assert last == "in smaller parts that records do not keep: +300 B"


def test_only_saved_memory_explains_what_is_saved() -> None:
    bigger = changed(FROZEN, num_bytes=8 * MIB)
    more = changed(SAVED, num_bytes=3 * MIB)
    before, after = of(FROZEN, SAVED), of(bigger, more)
    growth = what_grew(before, after, 2 * MIB, is_saved=True)
    assert [change.num_bytes for change in growth.changes] == [2 * MIB]
    assert growth.unexplained_bytes == 0


def test_small_changes_are_summed() -> None:
    rows = [changed(SAVED, module=f"m{i}", num_bytes=i * MIB) for i in range(1, 9)]
    found = lines(of(FROZEN), of(FROZEN, *rows))
    assert len(found) == 5 + 2
    assert found[5] == "+6.0 MiB  3 smaller changes"


@pytest.mark.parametrize(
    "value",
    [
        [],
        "text",
        {},
        peak(FROZEN) | {"peak_bytes": 1},
        peak(FROZEN) | {"saved_bytes": 1},
        peak(FROZEN) | {"rows": [["saved"]]},
        peak(FROZEN) | {"rows": [1]},
        peak(FROZEN) | {"phase": 3},
        peak(changed(FROZEN, num_bytes=-1)),
        peak(changed(FROZEN, shape="512")),
        peak(changed(FROZEN, module=None)),
        peak(changed(FROZEN, num_bytes=2.5)),
        peak(changed(FROZEN, num=True)),
        peak(changed(FROZEN, num=2.0)),
        peak(changed(FROZEN, shape=[512, -1])),
        peak(changed(FROZEN, shape=[512.0])),
        peak(changed(FROZEN, shape=[["512"]])),
        peak(changed(FROZEN, num=2**60 + 1)),
        peak(FROZEN) | {"rows": [[*FROZEN, 1]]},
        peak(FROZEN) | {"rows": {"a": FROZEN}},
        peak(FROZEN) | {"rows": "", "peak_bytes": 7},
        peak(FROZEN) | {"at_op": None},
        peak(FROZEN) | {"of_another_version": 1},
    ],
)
def test_what_is_no_breakdown_is_refused(value: Any) -> None:
    with pytest.raises(RecordError, match="`memory_breakdown` should have the fields"):
        read(value, "here")


def test_equal_rows_are_kept_once_and_nothing_is_changed() -> None:
    value = peak(FROZEN, SAVED)
    before, shared = copy.deepcopy(value), dict[Any, Any]()
    first = read(value, "here", shared)
    assert value == before
    assert json.loads(json.dumps(first.to_json())) == before
    assert read(copy.deepcopy(value), "here", shared) is first
    other = read(peak(changed(FROZEN, num=3), SAVED), "here", shared)
    assert other.rows[1] is first.rows[1]
    assert other.rows[0] == ("frozen", *FROZEN[1:5], (512, 512), 2 * MIB, 3, 0)


def test_a_value_that_only_equals_a_known_row_is_refused() -> None:
    """In Python, `True == 1 == 1.0`, with one hash."""
    shared: dict[Any, Any] = {}
    read(peak(changed(FROZEN, num=1)), "here", shared)
    for other in (True, 1.0):
        with pytest.raises(RecordError, match="`memory_breakdown`"):
            read(peak(changed(FROZEN, num=other)), "here", shared)


def test_the_check_prints_what_grew(
    make_record: MakeRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names in records are shown as printable text."""
    hostile = changed(SAVED, module="a\x1b[31m\n</script>" + "x" * 10**5)
    before = make_record(peak_allocated_bytes=100 * MIB)
    after = make_record(peak_allocated_bytes=101 * MIB)
    before["memory_breakdown"] = peak(FROZEN)
    after["memory_breakdown"] = peak(FROZEN, hostile)
    paths = [tmp_path / "before.jsonl", tmp_path / "after.jsonl"]
    for path, record in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(record) + "\n")
    words = ["check", str(paths[1]), "--baseline", str(paths[0])]
    words += ["--fail-on", "peak_allocated:0"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert (
        "  what grew  +1.0 MiB  +2x  saved  in forward  a\\x1b[31m\\n</script>" in out
    )
    assert len(out) < 2000
    assert main([*words, "--what-grew", "0"]) == 1
    assert "what grew" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main([*words, "--what-grew", "-1"])
    assert end.value.code == 2
    after["memory_breakdown"]["peak_bytes"] += 1
    paths[1].write_text(json.dumps(after) + "\n")
    assert main(words) == 2
    assert "after.jsonl, line 1: `memory_breakdown`" in capsys.readouterr().err
