"""`save_adapters`: write the trained tensors and the config of a model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from meft.checkpoint.backbone import backbone_fields
from meft.checkpoint.digests import digest
from meft.checkpoint.files import (
    CONFIG,
    FORMAT_VERSION,
    MODEL,
    MODEL_CONFIG,
    WEIGHTS,
    model_files,
    replace_file,
)
from meft.checkpoint.trained import refuse_without_values, trained_tensors
from meft.errors import UnsupportedCallError, UnsupportedModelError
from meft.reversible.blocks import find_stacks
from meft.sparse.adapter import sparse_adapters

_NO_MODEL = "meft adapters, no model: call meft.load_adapters(base_model, directory)"
"""`model_type` in the config of a directory that holds no whole model, which the error
of transformers' classes names.
"""


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
        next_to_model: whether a file of the model has just been written to the
            directory. Tensors that it contains are not written a second time.
    """
    refuse_without_values(trained)
    sparse, stacks = sparse_adapters(model), list(find_stacks(model).values())
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    in_model = (
        trained.keys() & model_files(directory).keys() if next_to_model else set()
    )
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
    if written or not in_model:
        replace_file(directory / WEIGHTS, lambda path: save_file(written, path))
    else:
        (directory / WEIGHTS).unlink(missing_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    replace_file(directory / CONFIG, lambda path: path.write_text(text))


def write_trained(
    model: Any, directory: str | Path, trained: dict[str, Tensor]
) -> None:
    """Write the trained tensors to the file of a model, and the config next to it.

    Args:
        model: a converted model of transformers.
        directory: the directory to write to, which is created if it does not exist.
        trained: the result of `trained_tensors`.

    Raises:
        UnsupportedCallError: the directory holds the weights of another model.
    """
    refuse_without_values(trained)
    directory = Path(directory)
    if _holds_a_model(directory):
        raise UnsupportedCallError(
            f"{directory} holds a whole model, whose weights would be replaced by "
            "those that were trained: save to another directory, or convert the model "
            "with `save_backbone=True` to save all of it"
        )
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_no_model(model), indent=2) + "\n"
    replace_file(directory / MODEL_CONFIG, lambda path: path.write_text(text))
    # With the entries by which `load_state_dict` recognises another config.
    state: dict[str, Tensor] = model.state_dict()
    written = {n: t for n, t in state.items() if n.endswith("_extra_state")} | trained
    metadata = {"format": "pt"}
    replace_file(directory / MODEL, lambda path: save_file(written, path, metadata))
    write_adapters(model, directory, trained, next_to_model=True)


def _no_model(model: Any) -> dict[str, Any]:
    """Return a config of transformers with which no model can be made.

    Without a config, the `from_pretrained` of a class would take its default one, and
    initialise all that is frozen at random.
    """
    fields = model.config.to_dict()
    sizes = ("hidden_size", "d_model", "n_embd", "dim", "num_hidden_layers")
    size = next((name for name in sizes if name in fields), "hidden_size")
    return {
        "model_type": _NO_MODEL,
        "architectures": [type(model).__name__],
        "base_model": getattr(model.config, "_name_or_path", ""),
        size: "not a whole model: call meft.load_adapters(base_model, directory)",
    }


def _holds_a_model(directory: Path) -> bool:
    """Return whether there are weights in a directory that are not a save of ours."""
    if (directory / f"{MODEL}.index.json").exists():
        return True
    if not (directory / MODEL_CONFIG).exists():
        return (directory / MODEL).exists()
    try:
        config = json.loads((directory / MODEL_CONFIG).read_text())
    except (OSError, ValueError):
        return True
    return not isinstance(config, dict) or config.get("model_type") != _NO_MODEL
