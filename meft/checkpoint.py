"""Save and load what is trained, and nothing else.

A directory holds two files: `adapters.safetensors`, every trainable parameter under its
name in the model, and `adapters.json`, which says what kind of model they belong to:
the configs of our methods, the shapes of the backbone, and digests of its frozen
weights and of the saved tensors. Loading compares all of them before it touches the
model. Next to a whole model written by `save_pretrained()`, the rows of sparse adapters
are in the model's file only.
"""

import contextlib
import hashlib
import json
import re
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME as MODEL

from meft.backbone.families import find_blocks, transformers_model
from meft.backbone.uncalled import allow_calls
from meft.errors import AdapterFileError, FrozenWarning, UnsupportedModelError
from meft.reversible.config import ReversibleConfig
from meft.reversible.convert import find_stacks, make_reversible
from meft.saving import remove_saving
from meft.sparse.config import SparseConfig
from meft.sparse.convert import (
    add_sparse_adapters,
    remove_sparse_adapters,
    sparse_adapters,
)
from meft.sparse.row_parameter import rows_of
from meft.trainable import has_peft_layers

WEIGHTS, CONFIG = "adapters.safetensors", "adapters.json"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""In version 1, a sparse adapter's neurons were called `rows`."""
IN_MODEL = "in_model_file"
"""Key of the config: names that are in transformers' file of the whole model."""
_SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "num_key_value_heads",
    "encoder_layers",
    "decoder_layers",
    "image_size",
    "patch_size",
    "max_position_embeddings",
)

Model = TypeVar("Model", bound=nn.Module)


def save_adapters(model: nn.Module, directory: str | Path) -> None:
    """Write the adapters, whatever else is trainable, and the config of a model.

    An earlier save in the same directory is replaced; each file appears whole or not at
    all.

    Args:
        model: a converted model, or a PeftModel that holds one.
        directory: where to write; it is made if it does not exist.

    Raises:
        UnsupportedModelError: the model has not been converted.
        OSError: `directory` cannot be written to; nothing half-written is left in it.
    """
    if not sparse_adapters(model) and not find_stacks(model):
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no adapters to save: call "
            "`meft.make_reversible()` or `meft.add_sparse_adapters()` first"
        )
    write_adapters(model, directory, trained_tensors(model))


def trained_tensors(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What `save_adapters` writes: adapters, and whatever else is trainable, by name.

    Args:
        model: a converted model.
        state_dict: the values to take instead of the model's own, such as averages.
            Without any of these names in it, nothing is to be written.

    Raises:
        AdapterFileError: `state_dict` has some of the names and not all.
    """
    adapters = _adapter_names(model)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in adapters
    }
    values: Mapping[str, Tensor] = parameters
    if state_dict is not None:
        missing = [name for name in parameters if name not in state_dict]
        if len(missing) == len(parameters):
            return {}
        if missing:
            raise AdapterFileError(
                f"`state_dict` has {len(parameters) - len(missing)} of the "
                f"{len(parameters)} tensors that were trained, but not {missing[0]!r}: "
                "pass all of them, or none to save the backbone alone"
            )
        values = state_dict
    return {name: values[name].detach().cpu().contiguous() for name in parameters}


def write_adapters(
    model: nn.Module,
    directory: str | Path,
    trained: Mapping[str, Tensor],
    *,
    next_to_model: bool = False,
) -> None:
    """Write what was trained, and the config of a model.

    Args:
        model: a converted model.
        directory: where to write; it is made if it does not exist.
        trained: the result of `trained_tensors`.
        next_to_model: whether `save_pretrained` of transformers has just written there.
            Rows that its files have are not written a second time.
    """
    sparse, stacks = sparse_adapters(model), list(find_stacks(model).values())
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rows = {name for name, p in model.named_parameters() if rows_of(p) is not None}
    in_model = rows & _model_files(directory).keys() if next_to_model else set()
    written = {name: t for name, t in trained.items() if name not in in_model}
    config = {
        "format_version": FORMAT_VERSION,
        "reversible": stacks[0].reversible.to_json() if stacks else None,
        "sparse": next(iter(sparse.values())).config.to_json() if sparse else None,
        "model_class": type(model).__name__,
        "backbone": _shape(model),
        "frozen_sha256": _digest_of_frozen(model, trained),
        "trained_sha256": _digest(trained),
        IN_MODEL: sorted(in_model),
    }
    # Weights before config: a directory with a config always has its weights.
    _replace(directory / WEIGHTS, lambda path: save_file(written, path))
    text = json.dumps(config, indent=2) + "\n"
    _replace(directory / CONFIG, lambda path: path.write_text(text))


def load_adapters(model: Model, directory: str | Path) -> Model:
    """Put saved adapters into `model`, converting it first if it is not reversible yet.

    Args:
        model: the class and backbone that the adapters were trained with. For what a
            PeftModel has saved, a PeftModel with the same tuners.
        directory: where `save_adapters()` or `model.save_pretrained()` wrote, such as a
            checkpoint of `Trainer`.

    Returns:
        `model` itself. It is left as it was if anything is refused.

    Raises:
        AdapterFileError: files missing or damaged; another model class, backbone shape,
            frozen weights, or reversible config; or tensors that do not fit or are
            missing.
    """
    directory = Path(directory)
    config = _read_config(directory)
    trained = _read_weights(directory, config)
    _refuse_other_backbone(model, config, trained, directory)
    with _converted(model, config, directory):
        parameters = dict(model.named_parameters())
        for name, value in trained.items():
            _refuse_misfit(name, value, parameters, directory)
        missing = sorted(_adapter_names(model) - trained.keys())
        if missing:
            raise AdapterFileError(
                f"{directory / WEIGHTS} lacks {missing[0]!r}, an adapter of the model"
            )
        is_first = config["format_version"] == 1
        if not is_first and config["trained_sha256"] != _digest(trained):
            raise AdapterFileError(
                f"{directory / WEIGHTS} does not hold the tensors that {CONFIG} was "
                "written with: a save was interrupted, or files of two saves were mixed"
            )
    fixed = {id(p) for a in sparse_adapters(model).values() for p in a.parameters()}
    with torch.no_grad():
        for name, value in trained.items():
            parameter = parameters[name].copy_(value)
            parameter.requires_grad |= id(parameter) not in fixed
    return model


@contextlib.contextmanager
def _converted(
    model: nn.Module, config: dict[str, Any], directory: Path
) -> Iterator[None]:
    """Give the model the adapters of `config`; undo it if the body raises."""
    of_sparse, of_reversible = config.get("sparse"), config["reversible"]
    sparse = SparseConfig.from_json(of_sparse) if of_sparse else None
    reversible = ReversibleConfig.from_json(of_reversible) if of_reversible else None
    stacks, adapters = find_stacks(model), sparse_adapters(model)
    for stack in stacks.values():
        if reversible is None or not stack.reversible.same_function(reversible):
            raise _other_adapters(directory, reversible, stack.reversible)
    for adapter in adapters.values():
        if sparse is None or not adapter.config.same_function(sparse):
            raise _other_adapters(directory, sparse, adapter.config)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    undo: list[Callable[[], object]] = []
    try:
        if sparse and not adapters:
            with _quietly():
                add_sparse_adapters(model, sparse)
            undo.append(lambda: remove_sparse_adapters(model))
        if reversible and not stacks:
            for found in find_blocks(model):
                blocks = getattr(found.owner, found.attribute)
                undo.append(partial(setattr, found.owner, found.attribute, blocks))
                undo += [partial(allow_calls, block) for block in blocks]
            if not adapters:
                undo.append(lambda: remove_saving(model))
            with _quietly():
                make_reversible(model, reversible)
        yield
    except BaseException:
        for step in reversed(undo):
            step()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What is trainable is decided by the files that are being loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FrozenWarning)
        yield


def _adapter_names(model: nn.Module) -> set[str]:
    """Names of all parameters of adapters, trainable or not."""
    stacks, sparse = find_stacks(model), sparse_adapters(model)
    modules = [*(stack.adapters for stack in stacks.values()), *sparse.values()]
    adapters = {id(p) for module in modules for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in adapters}


def _other_adapters(directory: Path, saved: object, given: object) -> AdapterFileError:
    return AdapterFileError(
        f"{directory} was saved with {saved}, this model was made with {given}"
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise AdapterFileError(
            f"no saved adapters in {directory}: {CONFIG} cannot be read "
            f"({error.strerror}); expected a directory written by `save_adapters()` or "
            f"by a converted model's `save_pretrained()`{_nearby(directory)}"
        ) from None
    except ValueError as error:
        raise AdapterFileError(f"{path} is not valid JSON: {error}") from None
    version = config.get("format_version") if isinstance(config, dict) else None
    if version not in READABLE_VERSIONS:
        raise AdapterFileError(
            f"{path} is of format version {version!r}, but this release of meft reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}"
        )
    return cast(dict[str, Any], config)


def _nearby(directory: Path) -> str:
    found = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
    return f". There are some in {', '.join(found)} inside it" if found else ""


def _read_weights(directory: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    try:
        found = load_file(path)
        elsewhere = _model_files(directory) if config.get(IN_MODEL) else {}
        for name in config.get(IN_MODEL, ()):
            path = elsewhere.get(name, directory / MODEL)
            with safe_open(path, "pt") as file:
                found[name] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from None
    if config["format_version"] == 1 and config.get("sparse"):
        return {re.sub(r"\.rows$", ".neurons", n): t for n, t in found.items()}
    return found


def _model_files(directory: Path) -> dict[str, Path]:
    """The file of each tensor that `save_pretrained()` has last written there."""
    whole, index = directory / MODEL, directory / f"{MODEL}.index.json"
    found = [path for path in (whole, index) if path.exists()]
    if not found:
        return {}
    # Either may be left over from an earlier save.
    if max(found, key=lambda path: path.stat().st_mtime_ns) == index:
        names: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: directory / file for name, file in names.items()}
    with safe_open(whole, "pt") as file:
        return dict.fromkeys(file.keys(), whole)


def _refuse_other_backbone(
    model: nn.Module,
    config: dict[str, Any],
    trained: dict[str, Tensor],
    directory: Path,
) -> None:
    saved, given = config["backbone"], _shape(model)
    pairs = [("model class", config["model_class"], type(model).__name__)]
    pairs += [(name, saved.get(name), given[name]) for name in given]
    wrong = [
        f"{name} {want!r}, got {got!r}" for name, want, got in pairs if want != got
    ]
    if wrong:
        # A PeftModel's names and layers are its own.
        peft = config["model_class"].startswith("Peft") and not has_peft_layers(model)
        advice = ". Load `PeftModel.from_pretrained(model, directory)` first"
        raise AdapterFileError(
            f"{directory} belongs to another backbone: expected {'; '.join(wrong)}"
            f"{advice if peft else ''}"
        )
    if _digest_of_frozen(model, trained) != config["frozen_sha256"]:
        raise AdapterFileError(
            f"{directory} belongs to other frozen weights: the shapes agree, the "
            "values do not. Load the checkpoint that the adapters were trained on"
        )


def _refuse_misfit(
    name: str, value: Tensor, parameters: Mapping[str, Tensor], directory: Path
) -> None:
    if name not in parameters:
        raise AdapterFileError(f"{directory} has {name!r}, which the model has not")
    if parameters[name].shape != value.shape:
        raise AdapterFileError(
            f"{directory} has {name!r} with shape {tuple(value.shape)}, the model with "
            f"shape {tuple(parameters[name].shape)}"
        )


def _shape(model: nn.Module) -> dict[str, Any]:
    config = transformers_model(model).config
    return {name: getattr(config, name, None) for name in _SHAPE_FIELDS}


def _digest_of_frozen(model: nn.Module, trained: Mapping[str, Tensor]) -> str:
    """As `_digest`, of the parameters that are not saved.

    They are rounded to bfloat16, so that a checkpoint loaded in float32 and in bfloat16
    agree.
    """
    parameters = model.named_parameters()
    frozen = {name: p for name, p in parameters if name not in trained}
    return _digest(frozen, torch.bfloat16)


def _digest(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """sha256 over names, shapes and a sample of the values.

    64 evenly spaced values of each: a digest in no time, whatever the size.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].clone().to("cpu", dtype)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename over it. Permissions follow the umask."""
    # Not `tempfile`, whose files are private; those of safetensors are, too.
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    beside.touch(exist_ok=False)
    mode = beside.stat().st_mode
    try:
        write(beside)
        beside.chmod(mode)
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{path} could not be written: {error}") from None
        raise
