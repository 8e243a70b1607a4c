"""The data files of methods, measurements and backbones: every field is checked."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from meft_bench.shared import backbones, measurement, methods, tables

CODE = Path(tables.__file__).parents[1]
FUNCTION, BART = 'function = "full:full"', 'classifier = "bart:BartClassifier"'
MODELS = 'models = ["classifier"]'
SHAPE = "[roberta.shapes.roberta-tiny]"
LORA_OPTIONS = '["lora_rank", "mlp_chunks"]'
WRONG = [
    (methods, FUNCTION, "function = 3", "full", "function"),
    (methods, FUNCTION, 'function = "full"', "full", "function"),
    (methods, FUNCTION, 'function = "nofile:full"', "full", "function"),
    (methods, LORA_OPTIONS, "5", "lora", "options"),
    (methods, LORA_OPTIONS, '"lora_rank"', "lora", "options"),
    (methods, LORA_OPTIONS, '["lora_rnk"]', "lora", "options"),
    (methods, "lost_bits = 8", 'lost_bits = "8"', "lora-exact", "defaults"),
    (methods, "lost_bits = 8", "lst_bits = 8", "lora-exact", "defaults"),
    (methods, "lost_bits = 8", "num_neurons = 8", "lora-exact", "defaults"),
    (methods, "{ lost_bits = 8 }", "8", "lora-exact", "defaults"),
    (methods, 'twin_of = "meft1"', 'twin_of = "meft9"', "meft1-store", "twin_of"),
    (methods, 'float_of = "meft1"', "float_of = 1", "meft1-exact", "float_of"),
    (methods, 'float_of = "meft1"', 'float_of = "no"', "meft1-exact", "float_of"),
    (methods, '"float"', '["float"]', "meft1", "streams"),
    (methods, '"dense"', '"thick"', "dense", "neurons"),
    (methods, "has_rows = true", 'has_rows = "yes"', "dense-offload", "has_rows"),
    (methods, '"#000000"', "4", "full", "color"),
    (methods, '"#000000"', '"black"', "full", "color"),
    (methods, 'marker = "o"', 'marker = "oo"', "full", "marker"),
    (methods, 'line = "--"', 'line = "---"', "boft", "line"),
    (methods, "hollow = true", "hollow = 1", "meft1-store", "hollow"),
    (measurement, '"int"', '["int"]', "num_parameters", "type"),
    (measurement, '"int"', '"itn"', "num_parameters", "type"),
    (measurement, '"count"', '"counts"', "num_parameters", "unit"),
    (measurement, '"count"', '["count"]', "num_parameters", "unit"),
    (measurement, '"model"', '"modl"', "num_parameters", "group"),
    (measurement, '"lower"', '"low"', "num_trainable_parameters", "better"),
    (measurement, "maximum = 1", 'maximum = "1"', "trainable_fraction", "maximum"),
    (measurement, "maximum = 1", "maximum = nan", "trainable_fraction", "maximum"),
    (measurement, "derived = true", "derived = 1", "trainable_fraction", "derived"),
    (measurement, "predicted = true", "predicted = 1", "seconds_at_least", "predicted"),
    (measurement, 'meaning = "', 'meaning = 3 # "', "num_parameters", "meaning"),
    (measurement, 'how = "', 'how = 3 # "', "num_parameters", "how"),
    (backbones, MODELS, "models = 3", "bert", "models"),
    (backbones, MODELS, 'models = "classifier"', "bert", "models"),
    (backbones, MODELS, 'models = [["classifier"]]', "bert", "models"),
    (backbones, MODELS, 'models = ["clasifier"]', "bert", "models"),
    (backbones, BART, 'classifier = "bart"', "bart", "classifier"),
    (backbones, BART, 'classifier = "brat:BartClassifier"', "bart", "classifier"),
    (backbones, "padding = true", 'padding = "yes"', "roberta", "positions_start_.*"),
    (backbones, "models = []", "models = []\nshapes = 3", "deit", "shapes"),
    (backbones, "models = []", "models = []\nshapes.a = 3", "deit", "shapes"),
    (backbones, SHAPE, "[roberta.shapes.bert-tiny]", "roberta", "shapes"),
]
FILES = {
    methods: tables.METHODS,
    measurement: tables.MEASUREMENTS,
    backbones: tables.BACKBONES,
}


def read(module: ModuleType, text: str, folder: Path) -> str:
    """Read a file with this text, and return the error message, without its path."""
    path = folder / FILES[module]
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "path_of", lambda *_: path)
        with pytest.raises(tables.TableError) as caught:
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
    text = tables.path_of(CODE, FILES[module]).read_text()
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


def test_a_number_cannot_have_the_name_of_a_field_of_a_cell(tmp_path: Path) -> None:
    """Both are in one row of the frame."""
    text = tables.path_of(CODE, tables.MEASUREMENTS).read_text()
    text = text.replace("[num_blocks]", "[method]")
    assert read(measurement, text, tmp_path) == "[method]: is a field of a cell"
