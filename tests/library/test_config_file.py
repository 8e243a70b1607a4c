"""A damaged `adapters.json` is refused before anything is compared with the model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import meft
from library.models import classifier, reversible
from meft.checkpoint.config_file import MAX_DEPTH
from meft.reversible.blocks import find_stacks

Keys = dict[str, Any]
KEYS = (
    *("format_version", "reversible", "sparse", "model_class", "backbone"),
    *("frozen_dtype", "frozen_sha256", "trained_sha256", "in_model_file"),
)
LEGAL: list[tuple[str, Any]] = [("sparse", None), ("in_model_file", [])]
OTHER = [None, 3, "x", [], {}, [3], {"x": 3}]
"""Values of every type of JSON, none of which a key can have, except for those above.
For a class called `x`, the file belongs to another backbone."""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    meft.save_adapters(reversible(1, variant="meft1"), tmp_path)
    return tmp_path / "adapters.json"


def refused(file: Path, model: PreTrainedModel, message: str) -> str:
    """The text of the error, which leaves the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(meft.AdapterFileError, match=message) as error:
        meft.load_adapters(model, file.parent)
    assert not find_stacks(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert str(file.parent) in str(error.value)
    return str(error.value)


def test_every_key_is_required_and_checked(saved: Path) -> None:
    """Without a key, and with each kind of value. The message has the file, the key,
    and what was given and expected."""
    good: Keys = json.loads(saved.read_text())
    assert good.keys() == set(KEYS)
    model = classifier(1)
    for key in KEYS:
        what = f"{saved}.*" + ("version" if key == "format_version" else f"`{key}`")
        saved.write_text(json.dumps({n: v for n, v in good.items() if n != key}))
        refused(saved, model, what)
        for value in OTHER:
            if (key, value) in [*LEGAL, ("model_class", "x")]:
                continue
            saved.write_text(json.dumps(good | {key: value}))
            message = refused(saved, model, what)
            assert key == "format_version" or "must be" in message or "field" in message
    saved.write_text(json.dumps(good | {"backbonne": {}}))
    refused(saved, model, "no field `backbonne`; did you mean 'backbone'")
    saved.write_text(json.dumps(good))
    meft.load_adapters(model, saved.parent)


DAMAGES: dict[str, tuple[Callable[[Keys], object], str]] = {
    "a field is missing": (
        lambda keys: keys["reversible"].pop("span"),
        "`reversible`: the field `span` is missing",
    ),
    "a field is misspelt": (
        lambda keys: keys["reversible"].update(lost_bit=3),
        "`reversible`: there is no field `lost_bit`; did you mean 'lost_bits'",
    ),
    "an illegal value": (
        lambda keys: keys["reversible"].update(variant="meft9"),
        "`reversible`: `variant` must be one of .* got 'meft9'",
    ),
    "a span that is no list": (
        lambda keys: keys["reversible"].update(span=3),
        "`reversible`: `span` must be two integers .* got 3",
    ),
    "values that exclude each other": (
        lambda keys: keys["reversible"].update(scale_1=0.5),
        "`reversible`: `scale_1` is for",
    ),
    "the other method": (
        lambda keys: keys.update(sparse={"num_neurons": 8}),
        "`sparse`: the field `top_k_neurons` is missing",
    ),
    "a digest": (
        lambda keys: keys["frozen_sha256"]["exact"].update({"some.weight": 5}),
        r"`frozen_sha256\.exact\.some\.weight` must be a sha256 .* got 5",
    ),
    "digests of a dtype": (
        lambda keys: keys["frozen_sha256"].pop("bfloat16"),
        "`frozen_sha256` must be an object with the keys exact, bfloat16, float16",
    ),
    "a dtype": (
        lambda keys: keys.update(frozen_dtype="torch.float33"),
        "`frozen_dtype` must be .* got 'torch.float33'",
    ),
    "fields of no config": (
        lambda keys: keys.update(backbone={"x": 3}),
        "`backbone` must contain fields .* got {'x': 3}",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_a_key_contains_is_checked(name: str, saved: Path) -> None:
    """Configs by their classes, whose error is the cause."""
    change, message = DAMAGES[name]
    keys: Keys = json.loads(saved.read_text())
    change(keys)
    saved.write_text(json.dumps(keys))
    refused(saved, classifier(1), message)


def test_deep_nesting_is_refused(saved: Path) -> None:
    """Where Python cannot read it, and where it could not compare or print it."""
    text = saved.read_text()
    model = classifier(1)
    for depth in (MAX_DEPTH, 900):
        nested = json.loads("[" * depth + "]" * depth)
        keys = json.loads(text)
        keys["backbone"]["hidden_act"] = nested
        saved.write_text(json.dumps(keys))
        refused(saved, model, f"`backbone` must have at most {MAX_DEPTH} nested")
    saved.write_text("[" * 100_000)
    refused(saved, model, "the file must have at most")
    saved.write_text("[]")
    refused(saved, model, r"the file must contain an object, got \[\]")


def test_a_damaged_index_of_a_whole_model_is_refused(saved: Path) -> None:
    """Of `save_pretrained`, which names the file of each tensor."""
    keys = json.loads(saved.read_text()) | {"in_model_file": ["some.weight"]}
    saved.write_text(json.dumps(keys))
    index = saved.parent / "model.safetensors.index.json"
    for text in ("{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"x": 3}}'):
        index.write_text(text)
        refused(saved, classifier(1), "index.json is damaged: `weight_map` must")
