"""`save_adapters`: write the trained tensors and the config of a model."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from meft.checkpoint.backbone import backbone_fields
from meft.checkpoint.digests import digest
from meft.checkpoint.files import (
    CONFIG,
    FORMAT_VERSION,
    WEIGHTS,
    model_files,
    replace_file,
)
from meft.checkpoint.trained import trained_tensors
from meft.errors import UnsupportedModelError
from meft.reversible.blocks import find_stacks
from meft.sparse.adapter import sparse_adapters
from meft.sparse.row_parameter import rows_of


def save_adapters(model: nn.Module, directory: str | Path) -> None:
    """Write the adapters, all other trainable parameters, and the config of a model.

    An earlier save in the same directory is replaced; each file is written completely
    or not at all.

    Args:
        model: a converted model, or a PeftModel that holds one.
        directory: the directory to write to, which is created if it does not exist.

    Raises:
        UnsupportedModelError: the model has not been converted.
        OSError: `directory` cannot be written to; no partial file is left in it.
    """
    if not sparse_adapters(model) and not find_stacks(model):
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no adapters to save: call "
            "`meft.make_reversible()` or `meft.add_sparse_adapters()` first"
        )
    write_adapters(model, directory, trained_tensors(model))


def write_adapters(
    model: nn.Module,
    directory: str | Path,
    trained: Mapping[str, Tensor],
    *,
    next_to_model: bool = False,
) -> None:
    """Write the trained tensors and the config of a model.

    Args:
        model: a converted model.
        directory: the directory to write to, which is created if it does not exist.
        trained: the result of `trained_tensors`.
        next_to_model: whether transformers' `save_pretrained` has just written to the
            directory. Rows that its files contain are not written a second time.
    """
    sparse, stacks = sparse_adapters(model), list(find_stacks(model).values())
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rows = {name for name, p in model.named_parameters() if rows_of(p) is not None}
    in_model = rows & model_files(directory).keys() if next_to_model else set()
    written = {name: t for name, t in trained.items() if name not in in_model}
    config = {
        "format_version": FORMAT_VERSION,
        "reversible": stacks[0].reversible.to_json() if stacks else None,
        "sparse": next(iter(sparse.values())).config.to_json() if sparse else None,
        **backbone_fields(model, trained),
        "trained_sha256": digest(trained),
        "in_model_file": sorted(in_model),
    }
    # Weights are written before the config: a directory with a config always has its
    # weights.
    replace_file(directory / WEIGHTS, lambda path: save_file(written, path))
    text = json.dumps(config, indent=2) + "\n"
    replace_file(directory / CONFIG, lambda path: path.write_text(text))
