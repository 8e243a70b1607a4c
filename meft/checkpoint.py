"""Saving and loading of the trained tensors.

A directory holds two files. `adapters.safetensors` contains every trainable parameter
and the buffers that belong to them, under their names in the model. `adapters.json`
identifies the model they belong to: the configs of our methods, the fields of the
backbone's config that define its function, and digests of all values of the backbone
and of the saved tensors. Loading compares all of them before it changes the model. Next
to a whole model written by `save_pretrained()`, the rows of sparse adapters are in the
model's file only.
"""

import contextlib
import hashlib
import json
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME as MODEL

from meft.backbone.find import find_blocks
from meft.backbone.heads import new_heads
from meft.backbone.uncalled import allow_calls
from meft.errors import AdapterFileError, FrozenWarning, UnsupportedModelError
from meft.reversible.config import ReversibleConfig
from meft.reversible.convert import find_stacks, make_reversible
from meft.saving import remove_saving
from meft.sparse.adapter import sparse_adapters
from meft.sparse.config import SparseConfig
from meft.sparse.convert import add_sparse_adapters, remove_sparse_adapters
from meft.sparse.row_parameter import rows_of
from meft.trainable import has_peft_layers

WEIGHTS, CONFIG = "adapters.safetensors", "adapters.json"
FORMAT_VERSION = 3
"""Versions 1 and 2, used in development, had digests of only some of the values."""
IN_MODEL = "in_model_file"
"""Key of the config: names of tensors in transformers' file of the whole model."""
_NO_PART_OF_THE_FUNCTION = {
    *("_name_or_path", "architectures", "auto_map", "tokenizer_class"),
    *("transformers_version", "dtype", "torch_dtype", "quantization_config"),
    *("id2label", "label2id", "num_labels", "problem_type"),
    *("finetuning_task", "task_specific_params", "prefix"),
    *("sep_token_id", "return_dict", "chunk_size_feed_forward"),
    *("initializer_range", "initializer_factor", "init_std"),
    *vars(GenerationConfig()),  # `use_cache` and `eos_token_id`, for example
}
"""Fields of transformers' configs that may differ; those of dropout may differ too."""
_DIGEST_DTYPES = {"exact": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes to which values are rounded before they are digested. `exact` is compared if
the model has the dtype in which it was saved; otherwise the others are.
"""
_CHUNK = 1 << 22
"""Number of values that are rounded and digested at a time."""

Model = TypeVar("Model", bound=nn.Module)


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


def trained_tensors(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors that `save_adapters` writes.

    These are the adapters, all other trainable parameters, and buffers.

    Args:
        model: a converted model.
        state_dict: values to use instead of the model's own, such as averages. If it
            contains none of these names, the result is empty.

    Raises:
        AdapterFileError: `state_dict` has some of the names but not all.
    """
    adapters = _adapter_names(model)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in adapters
    }
    values: Mapping[str, Tensor] = parameters | _buffers_of_trained(model)
    names = list(values)
    if state_dict is not None:
        missing = [name for name in names if name not in state_dict]
        if parameters.keys() <= set(missing):
            return {}
        if missing:
            raise AdapterFileError(
                f"`state_dict` has {len(names) - len(missing)} of the "
                f"{len(names)} tensors that were trained, but not {missing[0]!r}: "
                "pass all of them, or none to save the backbone alone"
            )
        values = state_dict
    return {name: values[name].detach().cpu().contiguous() for name in names}


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
    in_model = rows & _model_files(directory).keys() if next_to_model else set()
    written = {name: t for name, t in trained.items() if name not in in_model}
    frozen = _frozen(model, trained)
    config = {
        "format_version": FORMAT_VERSION,
        "reversible": stacks[0].reversible.to_json() if stacks else None,
        "sparse": next(iter(sparse.values())).config.to_json() if sparse else None,
        "model_class": type(model).__name__,
        "backbone": _function(model),
        "frozen_dtype": _dtype_of(frozen),
        "frozen_sha256": {
            name: _digests(frozen, dtype) for name, dtype in _DIGEST_DTYPES.items()
        },
        "trained_sha256": _digest(trained),
        IN_MODEL: sorted(in_model),
    }
    # Weights are written before the config: a directory with a config always has its
    # weights.
    _replace(directory / WEIGHTS, lambda path: save_file(written, path))
    text = json.dumps(config, indent=2) + "\n"
    _replace(directory / CONFIG, lambda path: path.write_text(text))


def load_adapters(model: Model, directory: str | Path) -> Model:
    """Load saved adapters into `model`, which is converted first if necessary.

    Args:
        model: a model with the class and backbone that the adapters were trained with.
            If a PeftModel was saved, a PeftModel with the same tuners.
        directory: the directory that `save_adapters()` or `model.save_pretrained()`
            wrote, such as a checkpoint of `Trainer`.

    Returns:
        `model` itself, which is unchanged if an error is raised.

    Raises:
        AdapterFileError: files are missing or damaged; the model class, the config or
            frozen weights of the backbone, or the config of our methods differ; or
            tensors do not fit or are missing.
    """
    directory = Path(directory)
    config = _read_config(directory)
    trained = _read_weights(directory, config)
    # This check precedes that of the weights, which would count the model's own
    # adapters as frozen.
    _refuse_other_adapters(model, config, directory)
    _refuse_other_backbone(model, config, trained, directory)
    with _converted(model, config, directory):
        parameters = dict(model.named_parameters())
        targets = parameters | dict(model.named_buffers())
        for name, value in trained.items():
            _refuse_misfit(name, value, targets, directory)
        missing = sorted(_adapter_names(model) - trained.keys())
        if missing:
            raise AdapterFileError(
                f"{directory / WEIGHTS} lacks {missing[0]!r}, an adapter of the model"
            )
        if config["trained_sha256"] != _digest(trained):
            raise AdapterFileError(
                f"{directory / WEIGHTS} does not hold the tensors that {CONFIG} was "
                "written with: a save was interrupted, or files of two saves were mixed"
            )
    fixed = {id(p) for a in sparse_adapters(model).values() for p in a.parameters()}
    with torch.no_grad():
        for name, value in trained.items():
            target = targets[name].copy_(value)
            if name in parameters:
                target.requires_grad |= id(target) not in fixed
    return model


def _configs(
    config: dict[str, Any],
) -> tuple[SparseConfig | None, ReversibleConfig | None]:
    of_sparse, of_reversible = config.get("sparse"), config["reversible"]
    return (
        SparseConfig.from_json(of_sparse) if of_sparse else None,
        ReversibleConfig.from_json(of_reversible) if of_reversible else None,
    )


def _refuse_other_adapters(
    model: nn.Module, config: dict[str, Any], directory: Path
) -> None:
    """Raise an error if the model has been converted with another config."""
    sparse, reversible = _configs(config)
    for stack in find_stacks(model).values():
        if reversible is None or not stack.reversible.same_function(reversible):
            raise _other_adapters(directory, reversible, stack.reversible)
    for adapter in sparse_adapters(model).values():
        if sparse is None or not adapter.config.same_function(sparse):
            raise _other_adapters(directory, sparse, adapter.config)


@contextlib.contextmanager
def _converted(
    model: nn.Module, config: dict[str, Any], directory: Path
) -> Iterator[None]:
    """Convert the model by the configs in `config`; undo this if the body raises."""
    sparse, reversible = _configs(config)
    stacks, adapters = find_stacks(model), sparse_adapters(model)
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
    """Suppress `FrozenWarning`, as the loaded files determine what is trainable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FrozenWarning)
        yield


def _adapter_names(model: nn.Module) -> set[str]:
    """Return the names of all parameters of adapters, trainable or not."""
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
    if version != FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} is of format version {version!r}, but this release of meft reads "
            f"version {FORMAT_VERSION}. Load it with the release that wrote it, and "
            "bring the model's `state_dict()` into a model that this release converted"
        )
    return cast(dict[str, Any], config)


def _nearby(directory: Path) -> str:
    found = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
    return f". There are some in {', '.join(found)} inside it" if found else ""


def _read_weights(directory: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    path, why = directory / WEIGHTS, ""
    try:
        found = load_file(path)
        elsewhere = _model_files(directory) if config.get(IN_MODEL) else {}
        for name in config.get(IN_MODEL, ()):
            why = (
                ". `save_pretrained` writes the rows of sparse adapters into the "
                "model's file only: keep the directory whole, or save with "
                "`meft.save_adapters`"
            )
            path = elsewhere.get(name, directory / MODEL)
            with safe_open(path, "pt") as file:
                found[name] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}{why}") from None
    return found


def _model_files(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor that the last `save_pretrained()` wrote there."""
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
    saved, given = config["backbone"], _function(model)
    pairs = [("model class", config["model_class"], type(model).__name__)]
    # Another version of transformers may have other fields.
    common = (name for name in given if name in saved)
    pairs += [(name, saved[name], given[name]) for name in common]
    wrong = [
        f"{name} {want!r}, got {got!r}" for name, want, got in pairs if want != got
    ]
    if wrong:
        # A PeftModel has its own names and layers.
        peft = config["model_class"].startswith("Peft") and not has_peft_layers(model)
        advice = ". Load `PeftModel.from_pretrained(model, directory)` first"
        raise AdapterFileError(
            f"{directory} belongs to another backbone: expected {'; '.join(wrong)}"
            f"{advice if peft else ''}"
        )
    _refuse_other_weights(_frozen(model, trained), config, directory)


def _refuse_other_weights(
    frozen: Mapping[str, Tensor], config: dict[str, Any], directory: Path
) -> None:
    expected: dict[str, dict[str, str]] = config["frozen_sha256"]
    unequal = dict(frozen)
    saved, given = config["frozen_dtype"], _dtype_of(frozen)
    names_of = ["exact"] if given == saved else ["bfloat16", "float16"]
    for name in names_of:
        dtype = _DIGEST_DTYPES[name]
        found = _digests(unequal, dtype)
        unequal = {
            n: unequal[n] for n, d in found.items() if d != expected[name].get(n)
        }
    names = [*unequal, *(expected["bfloat16"].keys() - frozen.keys())]
    if not names:
        return
    more = f" and {len(names) - 1} more differ" if len(names) > 1 else " differs"
    dtypes = (
        f", in {saved}: this model's weights are in {given}, and values that were "
        "rounded to one dtype cannot be compared with those rounded to another"
    )
    raise AdapterFileError(
        f"{directory} belongs to other frozen weights: {names[0]!r}{more}. Load the "
        "checkpoint that the adapters were trained on"
        f"{dtypes if given != saved else ''}"
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


def _function(model: nn.Module) -> dict[str, Any]:
    """Return config fields that define the function of transformers' models inside."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        inside = any(f"{name}.".startswith(f"{outer}.") or not outer for outer in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found[name] = module
    return {
        f"{name}.{field}" if len(found) > 1 else field: value
        for name, module in found.items()
        for field, value in _fields(module.config.to_dict()).items()
    }


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    kept = {
        name: _fields(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _NO_PART_OF_THE_FUNCTION and "drop" not in str(name)
    }
    as_read: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return as_read


def _buffers_of_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return buffers that belong to trained parameters, such as batch norm statistics.

    They are in task heads, in modules around the transformers models, and in modules
    with a trainable parameter of their own. All others count as part of the backbone.
    """
    heads = {
        id(module)
        for head in new_heads(model).values()
        if isinstance(head, nn.Module)
        for module in head.modules()
    }
    inside = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    pretrained = {id(m) for each in inside for m in each.modules()} - heads
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        own = module.parameters(recurse=False)
        if id(module) in pretrained and not any(p.requires_grad for p in own):
            continue
        found |= _persistent_buffers(name, module)
    return found


def _persistent_buffers(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{own}".lstrip("."): buffer
        for own, buffer in module.named_buffers(recurse=False)
        if own not in module._non_persistent_buffers_set
    }


def _frozen(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer that is not saved."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        found |= _persistent_buffers(name, module)
    return {name: tensor for name, tensor in found.items() if name not in trained}


def _dtype_of(tensors: Mapping[str, Tensor]) -> str:
    found = {str(t.dtype) for t in tensors.values() if t.is_floating_point()}
    return ", ".join(sorted(found))


def _digests(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, str]:
    """Return the sha256 of each tensor's shape and values; floats are in `dtype`."""
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        found = pool.map(partial(_digest_of_one, dtype=dtype), tensors.values())
        return dict(zip(tensors, found, strict=True))


def _digest_of_one(tensor: Tensor, dtype: torch.dtype | None) -> str:
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    with torch.no_grad():
        for chunk in tensor.detach().flatten().split(_CHUNK):
            if dtype is not None and chunk.is_floating_point():
                chunk = chunk.to(dtype)
            else:
                chunk = chunk.clone()  # rows cannot be viewed in another dtype
            digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of all names, shapes and values."""
    digests = sorted(_digests(tensors, dtype=None).items())
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary file and rename it. Permissions follow the umask."""
    # `tempfile` is not used, because its files are private; those of safetensors are,
    # too.
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
