"""Load a model, its tokenizer and the origin of its weights from a backbone's name.

    minilm-l6        real weights that a package contains: a BERT
    smollm2-135m     real weights that a package contains: a LLaMA
    dir:PATH         a directory in transformers' layout, of any family
    hub:NAME         a repository of the Hugging Face hub, from its cache unless
                     downloads are allowed
    random:SHAPE     random weights of a named shape, or of PATH/config.json

All are classifiers with a new head of `num_labels` outputs, initialised from torch's
current random state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from meft_bench.child.backbones import any_family, files, packages, shapes
from meft_bench.child.backbones.classifier import (
    blocks_of,
    finish,
    finish_any,
    image_shape,
    set_depth,
)
from meft_bench.child.backbones.files import Files, three_ways
from meft_bench.child.tasks.batches import PixelForm
from meft_bench.shared import configs
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import PACKAGED_BACKBONES, nearest
from meft_bench.shared.source import MissingError, Source

_PATTERNS = [
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_*",
    files.PREPROCESSOR,
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Backbone:
    """A classifier that is ready for a method, and the origin of its weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    """None for random weights, which have no vocabulary, and for images."""
    origin: str
    """Readable description: package, directory, hub name, or `random weights`.

    The description of a package includes its version.
    """
    sha256: str | None
    """SHA-256 of the file of weights, or of its shards; None for random weights."""
    pixel_form: PixelForm | None = None
    """The images that the model reads; None if it reads text."""


def load(cell: Cell, num_labels: int | None, source: Source) -> Backbone:
    """Load the backbone that `cell` names, with `cell.depth` blocks.

    Args:
        cell: the cell that the model is for.
        num_labels: number of classes of the head; None for a language model.
        source: where weights may come from.

    Raises:
        MissingError: the weights are not available; the message states how to provide
            them.
        ValueError: the backbone does not exist, its family is not supported, or
            `cell.seq_len` is too long for it.
    """
    _be_quiet()
    kind, _, name = cell.backbone.partition(":")
    if kind == "random" and name:
        config = shapes.find_config(name, any_type=name.endswith(".json"))
        if not any_family.is_known(config):
            any_family.require_for_sweeps(config, cell, num_labels)
        return from_config(config, _random(name), cell, num_labels)
    return _from_files(_find_files(cell, source), cell, num_labels)


def load_config(
    cell: Cell, source: Source, *, any_type: bool = False
) -> tuple[PreTrainedConfig, str]:
    """Return the config of the backbone that `cell` names, and its origin.

    Args:
        cell: names the backbone.
        source: where its config may come from.
        any_type: whether a config of a family that is not supported will do.

    Raises:
        MissingError, ValueError: see `load`; of a directory or a hub repository, only
            config.json is required, and downloaded.
    """
    _be_quiet()
    kind, _, name = cell.backbone.partition(":")
    if kind == "random" and name:
        return shapes.find_config(name, any_type=any_type), _random(name)
    if kind in ("dir", "hub") and name:
        folder = Path(name)
        if kind == "hub":
            folder = _download(name, source, [configs.FILE], configs.ways)
        config = files.read_config(folder / configs.FILE, any_type=any_type)
        return config, f"no weights, only the shape of {cell.backbone}"
    if cell.backbone in PACKAGED_BACKBONES:  # raises if a config is missing
        configs.check(cell.backbone, allow_download=source.allow_download)
    found = _find_files(cell, source)
    return files.config_of(found), f"no weights, only the shape of {found.origin}"


def from_config(
    config: PreTrainedConfig, origin: str, cell: Cell, num_labels: int | None
) -> Backbone:
    """Make a backbone with random weights.

    Args:
        config: config of the model; changed in place.
        origin: description of the weights.
        cell: the cell that the model is for.
        num_labels: number of classes of the head; None for a language model.

    Raises:
        ValueError: `cell.seq_len` is too long for it.
    """
    model = shapes.build(config, cell, num_labels)
    finish(model, None, cell)
    shape = image_shape(config)
    return Backbone(
        model=model,
        tokenizer=None,
        origin=origin,
        sha256=None,
        pixel_form=None if shape is None else PixelForm(shape=shape),
    )


def _finish(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, cell: Cell
) -> None:
    if any_family.is_known(model.config):
        finish(model, tokenizer, cell)
        return
    is_classifier = model.config.problem_type is not None
    heads = any_family.heads_of(model) if is_classifier else {}
    std = any_family.initial_std(model.config)
    finish_any(model, [*heads.values()], std, tokenizer, cell)


def num_blocks_of(model: PreTrainedModel) -> int:
    """Return the number of blocks of a model; 0 where its config names none."""
    if any_family.is_known(model.config):
        return len(blocks_of(model))
    return any_family.num_blocks(model.config)


def _be_quiet() -> None:
    log = transformers.utils.logging  # a new head would be reported
    log.set_verbosity_error()
    log.disable_progress_bar()


def _random(name: str) -> str:
    return f"random weights ({name} shape)"


def _find_files(cell: Cell, source: Source) -> Files:
    kind, _, name = cell.backbone.partition(":")
    if cell.backbone in PACKAGED_BACKBONES:
        return packages.find(cell.backbone)
    if kind == "dir":
        return files.find(Path(name), f"directory {name}")
    if kind == "hub":
        directory = _download(name, source, _PATTERNS, three_ways)
        return files.find(directory, f"hub {name} at {directory.name}")
    valid = [*PACKAGED_BACKBONES, "dir:PATH", "hub:NAME", "random:SHAPE"]
    raise ValueError(
        f"unknown backbone {cell.backbone!r}; {nearest(cell.backbone, valid)}"
    )


def _from_files(found: Files, cell: Cell, num_labels: int | None) -> Backbone:
    model = files.read_model(found, cell, num_labels)
    shape = image_shape(model.config)
    tokenizer = files.read_tokenizer(found) if shape is None else None
    finish(model, tokenizer, cell)
    if num_labels is None and not any_family.is_known(model.config):
        any_family.require_causal(model, cell)
    if cell.depth and any_family.is_known(model.config):
        set_depth(model, cell.depth)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        origin=found.origin,
        sha256=found.sha256(),
        pixel_form=None if shape is None else files.read_pixel_form(found, shape),
    )


def _download(
    name: str, source: Source, patterns: list[str], ways: Callable[[str], str]
) -> Path:
    """Return the files of a hub repository; only from the cache if offline."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    offline = not source.allow_download
    try:
        return Path(
            snapshot_download(name, allow_patterns=patterns, local_files_only=offline)
        )
    except LocalEntryNotFoundError as error:
        reason = "is not in the hub's cache" if offline else f"was not fetched: {error}"
        raise MissingError(ways(f"hub:{name} {reason}")) from error
    except OSError as error:
        raise MissingError(ways(f"hub:{name}: {error}")) from error
