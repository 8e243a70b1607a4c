import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

import meft
from library.models import batch, classifier, only_stack, reversible
from meft.reversible.convert import find_stacks


def trained() -> BertForSequenceClassification:
    """A reversible classifier whose adapters and head have moved from their start."""
    model = reversible(2, variant="meft2")
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.eval()
    return model


def test_saved_adapters_give_the_same_model_back(tmp_path: Path) -> None:
    """Loaded into a plain model and into a converted one, the logits are equal."""
    model = trained()
    meft.save_adapters(model, tmp_path)
    expected = model(**batch()).logits
    for target in (classifier(2), reversible(2, variant="meft2")):
        loaded = meft.load_adapters(target, tmp_path).eval()
        assert loaded is target
        assert torch.equal(loaded(**batch()).logits, expected)


def test_only_what_is_trained_is_written(tmp_path: Path) -> None:
    """The file holds the adapters and the head, bit for bit, and no backbone tensor."""
    model = trained()
    meft.save_adapters(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapters.json",
        "adapters.safetensors",
    ]
    written = load_file(tmp_path / "adapters.safetensors")
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda: classifier(3), "num_hidden_layers 2, got 3"),
        (lambda: classifier(2, hidden=32), "hidden_size 16, got 32"),
        (lambda: classifier(2).bert, "model class 'BertForSequenceClassification'"),
        (lambda: reversible(2, variant="meft1"), "was saved with"),
    ],
)
def test_another_backbone_is_refused(target, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The message has what was expected and what was given."""
    meft.save_adapters(trained(), tmp_path)
    with pytest.raises(meft.AdapterFileError, match=message):
        meft.load_adapters(target(), tmp_path)


def test_other_frozen_weights_are_refused(tmp_path: Path) -> None:
    """Same shapes, other values: refused. The same values in bfloat16: accepted."""
    meft.save_adapters(trained(), tmp_path)
    other = classifier(2)
    torch.nn.init.normal_(
        other.get_parameter("bert.encoder.layer.1.output.dense.weight")
    )
    with pytest.raises(meft.AdapterFileError, match="other frozen weights"):
        meft.load_adapters(other, tmp_path)
    half = classifier(2)
    half.bfloat16()
    meft.load_adapters(half, tmp_path)


def test_a_refused_load_leaves_the_model_alone(tmp_path: Path) -> None:
    """A misfit is found before anything is copied; the conversion is undone."""
    meft.save_adapters(trained(), tmp_path)
    weights = load_file(tmp_path / "adapters.safetensors")
    weights["classifier.bias"] = torch.zeros(7)
    save_file(weights, tmp_path / "adapters.safetensors")
    model = classifier(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(meft.AdapterFileError, match=r"classifier.bias.*\(7,\)"):
        meft.load_adapters(model, tmp_path)
    assert not find_stacks(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    model(**batch())


def test_how_the_backward_is_computed_does_not_matter(tmp_path: Path) -> None:
    """Adapters trained with stored activations load into a rebuilding model: the
    function is the same. Another number of lost bits is another function."""
    meft.save_adapters(trained(), tmp_path)
    how: dict[str, Any] = {"backward": "store", "mlp_chunks": 2, "on_mismatch": "redo"}
    meft.load_adapters(reversible(2, variant="meft2", **how), tmp_path)
    with pytest.raises(meft.AdapterFileError, match="lost_bits=3"):
        meft.load_adapters(reversible(2, variant="meft2", lost_bits=3), tmp_path)


@pytest.mark.parametrize("damage", ["missing", "config", "version", "weights"])
def test_missing_and_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    """Whatever is wrong with the files, the error is ours and has the path."""
    meft.save_adapters(trained(), tmp_path)
    config, weights = tmp_path / "adapters.json", tmp_path / "adapters.safetensors"
    if damage == "missing":
        config.unlink()
    elif damage == "config":
        config.write_text("{")
    elif damage == "version":
        config.write_text(json.dumps({"format_version": 99}))
    else:
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(meft.AdapterFileError, match=str(tmp_path)):
        meft.load_adapters(classifier(2), tmp_path)


def test_a_plain_model_has_nothing_to_save(tmp_path: Path) -> None:
    """The error says how to get adapters, and no file appears."""
    with pytest.raises(meft.UnsupportedModelError, match="make_reversible"):
        meft.save_adapters(classifier(1), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_spans_and_other_trained_parameters_survive(tmp_path: Path) -> None:
    """A span round-trips as it was, and so does a norm the user unfroze."""
    model = reversible(3, variant="meft1", span=(1, 3))
    norm: Any = only_stack(model).get_submodule("2.output.LayerNorm")
    norm.weight.requires_grad_(True)
    torch.nn.init.constant_(norm.weight, 5.0)
    meft.save_adapters(model, tmp_path)
    loaded = meft.load_adapters(classifier(3), tmp_path)
    encoder = only_stack(loaded)
    assert encoder.reversible == only_stack(model).reversible
    weight = encoder.get_parameter("2.output.LayerNorm.weight")
    assert weight.requires_grad
    assert torch.equal(weight, norm.weight)
