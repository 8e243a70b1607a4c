"""`load_adapters`: load saved adapters into a model, which is converted if necessary.

Everything that identifies the model is compared before the model changes.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from meft.checkpoint.backbone import refuse_other_backbone
from meft.checkpoint.config_file import SavedConfig, read_config
from meft.checkpoint.digests import digest
from meft.checkpoint.files import (
    CONFIG,
    PEFT_WEIGHTS,
    WEIGHTS,
    read_file,
    read_weights,
)
from meft.checkpoint.save_pretrained import add_saving, remove_saving
from meft.checkpoint.trained import adapter_names
from meft.errors import AdapterFileError, FrozenWarning
from meft.extra_state import refuse_other_function
from meft.reversible.blocks import ReversibleBlocks, find_stacks
from meft.reversible.config import ReversibleConfig
from meft.reversible.convert import insert_stacks, remove_stacks
from meft.sparse.adapter import SparseAdapter, sparse_adapters
from meft.sparse.config import SparseConfig
from meft.sparse.convert import insert_sparse_adapters, remove_sparse_adapters
from meft.sparse.row_shares import own_rows

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config", ReversibleConfig, SparseConfig)


def load_adapters(
    model: Model, directory: str | Path, *, save_backbone: bool = False
) -> Model:
    """Load saved adapters into `model`, which is converted first if necessary.

    Args:
        model: a model with the class and backbone that the adapters were trained with.
            If a PeftModel was saved, a PeftModel with the same tuners.
        directory: the directory that `save_adapters()` or `model.save_pretrained()`
            wrote, such as a checkpoint of `Trainer`.
        save_backbone: whether `model.save_pretrained` also writes what is frozen, if
            the model is converted here; see `meft.make_reversible`.

    Returns:
        `model` itself, which is unchanged if an error is raised.

    Raises:
        AdapterFileError: files are missing or damaged; the model class, the config or
            frozen weights of the backbone, or the config of our methods differ; or
            tensors do not fit or are missing.
    """
    directory = Path(directory)
    config = read_config(directory)
    trained = read_weights(directory, config.in_model_file)
    # This check precedes that of the weights, which would count the model's own
    # adapters as frozen.
    _refuse_other_adapters(model, config, directory)
    refuse_other_backbone(model, config, trained, directory)
    _refuse_other_peft_file(model, trained, directory)
    was_plain = not find_stacks(model)
    with _converted(model, config, save_backbone):
        parameters = dict(model.named_parameters())
        targets = parameters | dict(model.named_buffers())
        own = _own_rows(model, trained)
        for name, value in own.items():
            _refuse_misfit(name, value, targets, directory)
        missing = sorted(adapter_names(model) - trained.keys())
        if missing:
            raise AdapterFileError(
                f"{directory / WEIGHTS} lacks {missing[0]!r}, an adapter of the model"
            )
        if config.trained_sha256 != digest(trained):
            raise AdapterFileError(
                f"{directory / WEIGHTS} does not hold the tensors that {CONFIG} was "
                "written with: a save was interrupted, or files of two saves were mixed"
            )
    fixed = {id(p) for a in sparse_adapters(model).values() for p in a.parameters()}
    with torch.no_grad():
        for name, value in own.items():
            target = targets[name].copy_(value)
            if name in parameters:
                target.requires_grad |= id(target) not in fixed
    if was_plain and config.reversible and config.reversible.adapter is None:
        # Nothing has been frozen by the conversion: train what was trained.
        for name, parameter in parameters.items():
            if parameter.is_floating_point() and name not in trained:
                parameter.requires_grad = False
    return model


def _own_rows(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return saved tensors with the rows of this process, if these are divided."""
    rows = {f"{name}.neurons": a.rows for name, a in sparse_adapters(model).items()}
    return {n: own_rows(rows[n], t) if n in rows else t for n, t in trained.items()}


def _refuse_other_adapters(
    model: nn.Module, config: SavedConfig, directory: Path
) -> None:
    """Raise an error if the model has been converted with another config."""
    for stack in find_stacks(model).values():
        _refuse_other(config.reversible, stack.reversible, directory)
    for adapter in sparse_adapters(model).values():
        _refuse_other(config.sparse, adapter.config, directory)


def _refuse_other_peft_file(
    model: nn.Module, trained: Mapping[str, Tensor], directory: Path
) -> None:
    """Raise an error if peft's file has other values than ours for the same tensors."""
    path = directory / PEFT_WEIGHTS
    names: Iterable[str] = getattr(model, "peft_config", {})
    if not path.is_file() or not names:
        return
    theirs = read_file(path)
    for name, value in trained.items():
        for adapter in names:
            same = theirs.get(name.replace(f".{adapter}.", ".", 1))
            if same is not None and not torch.equal(same, value):
                raise AdapterFileError(
                    f"{path} and {WEIGHTS} differ in {name!r}: files of two saves were "
                    "mixed, or one was changed. Save the model again; or load peft's "
                    "file alone, by `PeftModel.from_pretrained`, and call "
                    "`meft.make_reversible` on the result"
                )


def _refuse_other(saved: Config | None, given: Config, directory: Path) -> None:
    remedy = "Load them into a model that has not been converted"
    if saved is None:
        raise AdapterFileError(
            f"the adapters in {directory} were saved from a model without a "
            f"{type(given).__name__}, but this model was converted with one. {remedy}"
        )
    refuse_other_function(
        saved.function(),
        given.function(),
        what=f"the adapters in {directory}",
        remedy=f"{remedy}, or convert the model with the config of the saved one",
    )


@contextlib.contextmanager
def _converted(
    model: nn.Module, config: SavedConfig, save_backbone: bool
) -> Iterator[None]:
    """Convert the model by the configs in `config`; undo this if the body raises."""
    sparse, reversible = config.sparse, config.reversible
    stacks, adapters = find_stacks(model), sparse_adapters(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    undo: list[Callable[[], object]] = []
    try:
        if sparse and not adapters:
            with _quietly():
                insert_sparse_adapters(model, sparse)
            undo.append(lambda: remove_sparse_adapters(model))
            undo.append(lambda: remove_saving(model))
            add_saving(model, SparseAdapter, load_adapters, save_backbone)
        if reversible and not stacks:
            undo.append(lambda: remove_stacks(model))
            if not adapters:
                undo.append(lambda: remove_saving(model))
            with _quietly():
                insert_stacks(model, reversible)
            add_saving(model, ReversibleBlocks, load_adapters, save_backbone)
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
