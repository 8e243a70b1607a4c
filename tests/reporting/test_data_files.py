"""The data files of methods and measurements: every field that is read is checked."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from meft_reports import data_files, methods
from meft_reports.columns import measurement
from meft_reports.errors import ReportError

FILES = {methods: data_files.METHODS, measurement: data_files.MEASUREMENTS}
LORA_OPTIONS = '["lora_rank", "mlp_chunks"]'
WRONG = [
    (methods, LORA_OPTIONS, '"lora_rank"', "lora", "options"),
    (methods, LORA_OPTIONS, '["lora_rnk"]', "lora", "options"),
    (methods, 'twin_of = "meft1"', 'twin_of = "meft9"', "meft1-store", "twin_of"),
    (methods, 'float_of = "meft1"', 'float_of = "no"', "meft1-exact", "float_of"),
    (methods, '"float"', '["float"]', "meft1", "streams"),
    (methods, '"dense"', '"thick"', "dense", "neurons"),
    (methods, '"#000000"', "4", "full", "color"),
    (methods, 'marker = "o"', 'marker = "oo"', "full", "marker"),
    (methods, 'line = "--"', "line = 3", "boft", "line"),
    (methods, "hollow = true", "hollow = 1", "meft1-store", "hollow"),
    (measurement, '"int"', '["int"]', "num_parameters", "type"),
    (measurement, '"count"', '["count"]', "num_parameters", "unit"),
    (measurement, '"model"', '"modl"', "num_parameters", "group"),
    (measurement, '"lower"', '"low"', "num_trainable_parameters", "better"),
    (measurement, "maximum = 1", 'maximum = "1"', "trainable_fraction", "maximum"),
    (measurement, "derived = true", "derived = 1", "trainable_fraction", "derived"),
    (measurement, "predicted = true", "predicted = 1", "seconds_at_least", "predicted"),
    (measurement, 'meaning = "', 'meaning = 3 # "', "num_parameters", "meaning"),
    (measurement, 'how = "', 'how = 3 # "', "num_parameters", "how"),
]


def read(module: ModuleType, text: str, folder: Path) -> str:
    """Read a file with this text, and return the error message, without its path."""
    path = folder / FILES[module]
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_files, "path_of", lambda _: path)
        patch.setattr(measurement, "path_of", lambda _: path)
        with pytest.raises(ReportError) as caught:
            module._read()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(("module", "old", "new", "table", "field"), WRONG)
def test_a_wrong_value_is_one_line(
    tmp_path: Path, module: ModuleType, old: str, new: str, table: str, field: str
) -> None:
    """It names the full path, the table, the field, the value and what is valid."""
    text = data_files.path_of(FILES[module]).read_text()
    assert old in text
    message = read(module, text.replace(old, new, 1), tmp_path)
    assert re.fullmatch(rf"\[{table}\]: `{field}` = .+ should be .+", message)


@pytest.mark.parametrize("module", FILES)
@pytest.mark.parametrize(
    ("text", "words"),
    [("", "no tables; write one as [NAME]"), ("a = " + "[" * 100_000, "too deeply")],
)
def test_a_file_without_tables_is_one_line(
    tmp_path: Path, module: ModuleType, text: str, words: str
) -> None:
    """It is empty, or nested more deeply than can be read."""
    assert words in read(module, text, tmp_path)


@pytest.mark.parametrize("name", ["method", "machine"])
def test_a_number_cannot_have_the_name_of_another_column(
    tmp_path: Path, name: str
) -> None:
    """The frame has one column of each name."""
    text = data_files.path_of(data_files.MEASUREMENTS).read_text()
    message = read(measurement, text.replace("[num_blocks]", f"[{name}]"), tmp_path)
    assert message == f"[{name}]: is another column of the frame already"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[num_blocks]", "[num_blocks]\nderived = true", "[num_blocks]: `derived`"),
        ("derived = true", "derived = false", "[trainable_fraction]: `derived`"),
        ("[transfer_bytes]", "[moved_bytes]", "[moved_bytes]: `derived` = true"),
        ("[h2d_bytes]", "[to_device_bytes]", "no [h2d_bytes], which"),
    ],
)
def test_a_derived_number_has_a_formula(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    """And a formula has its number and its sources in the file."""
    text = data_files.path_of(data_files.MEASUREMENTS).read_text()
    message = read(measurement, text.replace(old, new, 1), tmp_path)
    assert message.startswith(words)
    assert "meft_reports/derived.py" in message
