"""The numbers of a measurement, which `measurements.toml` declares."""

import copy
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meft_bench.shared import tables
from meft_bench.shared.measurement import FIELDS, Measurement

PACKAGE = Path(tables.__file__).parents[1]


def test_a_number_that_was_not_measured_is_none() -> None:
    seen = Measurement(saved_bytes=3)
    assert seen.saved_bytes == 3
    assert seen.score is None
    assert seen.to_json() == dict.fromkeys(FIELDS) | {"saved_bytes": 3}
    assert list(seen.to_json()) == list(FIELDS)
    assert repr(seen) == "Measurement(saved_bytes=3)"


def test_an_unknown_number_is_refused_with_the_nearest_name() -> None:
    """Whether it is set, added or read."""
    hint = "did you mean 'saved_bytes'"
    with pytest.raises(ValueError, match=hint):
        Measurement(saved_byte=3)
    with pytest.raises(ValueError, match=hint):
        Measurement().with_numbers(saved_byte=3)
    with pytest.raises(AttributeError, match=hint):
        _ = Measurement().saved_byte


def test_a_measurement_cannot_be_changed() -> None:
    seen = Measurement(saved_bytes=3)
    with pytest.raises(AttributeError, match="cannot set `saved_bytes`"):
        seen.saved_bytes = 4
    with pytest.raises(AttributeError, match="cannot delete `saved_bytes`"):
        del seen.saved_bytes
    more = seen.with_numbers(num_steps=2)
    assert seen == Measurement(saved_bytes=3)
    assert more == Measurement(saved_bytes=3, num_steps=2)
    assert seen != more
    assert copy.deepcopy(more) == pickle.loads(pickle.dumps(more)) == more


def test_derived_numbers_are_not_in_a_record() -> None:
    """The reports compute them."""
    assert "peak_activation_bytes" not in FIELDS
    assert "peak_allocated_bytes" in FIELDS


@pytest.mark.parametrize("file", tables.FILES)
@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[a\n", "line 1"),
        ("[a]\nwrong = 1\n", r"\[a\]: unknown field 'wrong'; fields are "),
        ("a = 1\n", "'a' is not a table"),
        ("[a]\n", r"\[a\]: no `\w+`"),
    ],
)
def test_a_wrong_table_is_one_line(
    tmp_path: Path, file: str, text: str, place: str
) -> None:
    """It names the file and the place, and the command is a usage error."""
    copied = tmp_path / "meft_bench"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    for name in tables.FILES:  # in a checkout they are next to the package
        shutil.copy(tables.path_of(PACKAGE, name), tables.path_of(copied, name))
    tables.path_of(copied, file).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "meft_bench", "list", "gate"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(rf"meft-bench: .*{file}: .*{place}.*\n", done.stderr)


def test_every_number_of_a_record_is_measured_somewhere() -> None:
    """Its name is in the code of a child, in that of a virtual GPU, or where `fit`
    turns its answers into records."""
    paths = [p for f in ("child", "virtual") for p in (PACKAGE / f).rglob("*.py")]
    paths.append(PACKAGE / "parent" / "fit_records.py")
    sources = "\n".join(path.read_text() for path in paths)
    # The second and third scores of a task are named after the first.
    names = {re.sub("^(second|third)_", "", name) for name in FIELDS}
    missing = [name for name in names if not re.search(rf"\b{name}\b", sources)]
    assert not missing
