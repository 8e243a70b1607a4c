import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import meft
from library.models import VOCAB, batch, classifier, only_stack, reversible
from meft.reversible.blocks import find_stacks


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
        (lambda: reversible(2, variant="meft1"), "with `variant='meft2'`, but"),
        (lambda: reversible(2, variant="meft3"), "this .* with `variant='meft3'`: "),
        (
            lambda: reversible(2, variant="meft2", arithmetic="float"),
            "this .* with `arithmetic='float'`, `lost_bits=None`, `scale_1=1.0`, ",
        ),
        (
            lambda: meft.add_sparse_adapters(classifier(2), meft.SparseConfig()),
            "without a SparseConfig, but .* that has not been converted",
        ),
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


def test_a_value_that_differs_in_its_last_bit_is_refused(tmp_path: Path) -> None:
    """In the dtype that it was saved in, nothing is rounded before it is compared."""
    meft.save_adapters(trained(), tmp_path)
    target = classifier(2)
    weight = target.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        weight[3, 1] = torch.nextafter(weight[3, 1], torch.tensor(9.0))
    with pytest.raises(meft.AdapterFileError, match="word_embeddings"):
        meft.load_adapters(target, tmp_path)


def test_one_other_value_is_refused_wherever_it_is(tmp_path: Path) -> None:
    """Every value counts, and so do rows of embeddings that were added. The message
    names the tensor."""
    meft.save_adapters(trained(), tmp_path)
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    for place in (0, 1, 77, 511):
        other = classifier(2)
        with torch.no_grad():
            other.get_parameter(name).flatten()[place] += 1
        with pytest.raises(meft.AdapterFileError, match=f"'{name}' differs"):
            meft.load_adapters(other, tmp_path)
    models = []
    for seed in (1, 2):
        model = classifier(2)
        torch.manual_seed(seed)
        model.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
        models.append(model)
    meft.make_reversible(models[0], meft.ReversibleConfig(variant="meft1"))
    meft.save_adapters(models[0], tmp_path)
    with pytest.raises(meft.AdapterFileError, match="word_embeddings"):
        meft.load_adapters(models[1], tmp_path)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            **options,
        )
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_theta": 100.0, "rope_type": "default"}),
        ("rms_norm_eps", 1e-3),
    ],
)
def test_another_function_of_the_same_weights_is_refused(
    name: str, value: Any, tmp_path: Path
) -> None:
    """A field of the config that changes what the backbone computes is compared."""
    model = meft.make_reversible(llama(), meft.ReversibleConfig(variant="meft1"))
    meft.save_adapters(model, tmp_path)
    with pytest.raises(meft.AdapterFileError, match=f"another backbone.*{name}"):
        meft.load_adapters(llama(**{name: value}), tmp_path)


def test_fields_without_effect_on_the_function_may_differ(tmp_path: Path) -> None:
    """Dropout, initialisation, names, tokens, the cache, and what a later version of
    transformers may know."""
    model = meft.make_reversible(llama(), meft.ReversibleConfig(variant="meft1"))
    meft.save_adapters(model, tmp_path)
    other = llama(
        attention_dropout=0.5, initializer_range=0.5, use_cache=False, eos_token_id=7
    )
    other.load_state_dict(llama().state_dict())
    other.config.id2label = {0: "no", 1: "yes"}
    other.config.problem_type = "regression"
    other.config.of_a_later_version = 3
    other.config.dtype = "bfloat16"
    meft.load_adapters(other, tmp_path)


def test_both_models_of_a_wrapper_are_compared(tmp_path: Path) -> None:
    """The error names the one that differs."""

    class Two(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.one, self.other = llama(), llama(**options)

    model = meft.make_reversible(Two(), meft.ReversibleConfig(variant="meft1"))
    meft.save_adapters(model, tmp_path)
    with pytest.raises(meft.AdapterFileError, match=r"other\.hidden_act 'silu'"):
        meft.load_adapters(Two(hidden_act="gelu"), tmp_path)
    meft.load_adapters(Two(), tmp_path)


@pytest.mark.parametrize("loaded", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("saved", ["float32", "bfloat16", "float16"])
def test_the_same_checkpoint_in_another_dtype(
    saved: str, loaded: str, tmp_path: Path
) -> None:
    """A checkpoint in float32 may be loaded in any dtype, before training and after.
    Between bfloat16 and float16, neither of which holds the values of the other, it is
    refused, with the remedy."""
    model: Any = nn.Module.to(classifier(2), getattr(torch, saved))
    meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    meft.save_adapters(model, tmp_path)
    other: Any = nn.Module.to(classifier(2), getattr(torch, loaded))
    if {saved, loaded} == {"bfloat16", "float16"}:
        with pytest.raises(meft.AdapterFileError, match=f"in torch.{saved}: this mode"):
            meft.load_adapters(other, tmp_path)
    else:
        meft.load_adapters(other, tmp_path)


class Normalised(nn.Module):
    """A wrapper whose head has buffers, one of them not in `state_dict()`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = classifier(2)
        torch.manual_seed(3)
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.register_buffer("scale", torch.ones(3), persistent=False)

    def forward(self, **rows: Tensor) -> Tensor:
        out: Tensor = self.norm(self.model(**rows).logits)
        return out


def test_buffers_of_what_is_trained_come_back(tmp_path: Path) -> None:
    """The running statistics of a head's batch norm; a file without them, or a model
    that has none, is refused."""
    model = Normalised()
    meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    for _ in range(3):
        model(**batch())
    meft.save_adapters(model, tmp_path)
    written = load_file(tmp_path / "adapters.safetensors")
    assert {name for name in written if "norm" in name and "model" not in name} == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    loaded = meft.load_adapters(Normalised(), tmp_path)
    assert torch.equal(loaded.eval()(**batch()), model.eval()(**batch()))
    other = Normalised()
    other.norm = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(meft.AdapterFileError, match=r"norm.*which the model has not"):
        meft.load_adapters(other, tmp_path)
    save_file(
        {n: t for n, t in written.items() if n != "norm.running_mean"},
        tmp_path / "adapters.safetensors",
    )
    with pytest.raises(meft.AdapterFileError, match="running_mean"):
        meft.load_adapters(Normalised(), tmp_path)


def test_buffers_of_a_head_in_the_model_come_back(tmp_path: Path) -> None:
    """As those of a wrapper; other buffers of the backbone are compared, not saved."""

    def build() -> Any:
        model: Any = classifier(2)
        torch.manual_seed(3)
        model.classifier = nn.Sequential(
            nn.Linear(16, 3), nn.BatchNorm1d(3, affine=False)
        )
        model.bert.register_buffer("mean", torch.zeros(2))
        return model

    model = meft.make_reversible(build(), meft.ReversibleConfig(variant="meft1"))
    model(**batch())
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert "classifier.1.running_mean" in written
    assert "bert.mean" not in written
    loaded = meft.load_adapters(build(), tmp_path).eval()
    assert torch.equal(loaded(**batch()).logits, model.eval()(**batch()).logits)
    other = build()
    other.bert.mean += 1
    with pytest.raises(meft.AdapterFileError, match=r"'bert\.mean' differs"):
        meft.load_adapters(other, tmp_path)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_of_earlier_formats_are_refused(version: int, tmp_path: Path) -> None:
    """Their digests cannot tell whether the backbone is the same."""
    meft.save_adapters(trained(), tmp_path)
    path = tmp_path / "adapters.json"
    config = json.loads(path.read_text()) | {"format_version": version}
    path.write_text(json.dumps(config))
    with pytest.raises(meft.AdapterFileError, match=f"version {version}.*state_dict"):
        meft.load_adapters(classifier(2), tmp_path)


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
    function is the same. Another number of lost bits is another function, and the error
    names no other field."""
    meft.save_adapters(trained(), tmp_path)
    how: dict[str, Any] = {"backward": "store", "mlp_chunks": 2, "on_mismatch": "redo"}
    meft.load_adapters(reversible(2, variant="meft2", **how), tmp_path)
    message = (
        f"the adapters in {tmp_path} were saved from a model that was converted with "
        "`lost_bits=4`, but this model was converted with `lost_bits=3`: with it they "
        "compute another function. Load them into a model that has not been converted, "
        "or convert the model with the config of the saved one"
    )
    with pytest.raises(meft.AdapterFileError, match=f"^{re.escape(message)}$"):
        meft.load_adapters(
            reversible(2, variant="meft2", lost_bits=3, mlp_chunks=2), tmp_path
        )


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
