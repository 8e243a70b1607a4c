"""Functions that convert a model in place, and undo that."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn

from meft.checkpoint.load import load_adapters
from meft.checkpoint.save_pretrained import (
    add_saving,
    remove_saving,
    without_saving,
)
from meft.errors import UnsupportedModelError
from meft.reversible.blocks import ReversibleBlocks, find_stacks
from meft.reversible.config import ReversibleConfig
from meft.reversible.convert import insert_stacks, remove_stacks, without_stacks
from meft.sparse.adapter import SparseAdapter, sparse_adapters
from meft.sparse.config import SparseConfig
from meft.sparse.convert import (
    insert_sparse_adapters,
    remove_sparse_adapters,
    without_sparse_adapters,
)
from meft.sparse.row_parameter import rows_of

Model = TypeVar("Model", bound=nn.Module)


def make_reversible(
    model: Model, config: ReversibleConfig, *, save_backbone: bool = False
) -> Model:
    """Replace every list of blocks in a model by a reversible stack, in place.

    The model keeps its class, its `forward` signature and its outputs. Afterwards the
    adapters and a newly made task head (`classifier`, `qa_outputs`, `score`, ...) are
    trainable and everything else is frozen (Liao et al., NeurIPS 2023, section 4.1).
    If some parameters were frozen before and others were not, manually or because the
    model is a PeftModel, that choice is kept and the adapters are trained in addition.
    Change `requires_grad` afterwards to train more or fewer parameters. With
    `adapter=None` in the config, `requires_grad` is left as it is: a PeftModel trains
    what peft has added, and a plain model all of its parameters.

    From then on `model.save_pretrained`, which `Trainer` calls, writes what is trained
    and not the frozen backbone, as peft does; `meft.load_adapters` reads it.

    Args:
        model: any class of a supported family, which `meft.backbone.families` lists, or
            a PeftModel that holds one.
        config: variant, arithmetic, span and backward pass.
        save_backbone: whether `model.save_pretrained` also writes what is frozen, so
            that the directory holds the whole model.

    Returns:
        `model` itself.

    Raises:
        UnsupportedModelError: the model is not of a supported family, is already
            reversible, or has gradient checkpointing on.
        ConfigError: `config` is something else, or `config.span` reaches beyond the
            model's blocks.

    Warns:
        FrozenWarning: a task head was frozen before and stays frozen, or a head stays
            frozen because it may be pre-trained; or nothing would be trained.
    """
    insert_stacks(model, config)
    add_saving(model, ReversibleBlocks, load_adapters, save_backbone)
    return model


def add_sparse_adapters(
    model: Model, config: SparseConfig, *, save_backbone: bool = False
) -> Model:
    """Add a sparse adapter next to the feed-forward of every block, in place.

    The model keeps its class, its `forward` signature and its outputs; initially it
    computes the same function as before. Afterwards routers, rows and a newly made task
    head are trainable and everything else is frozen, unless some parameters were frozen
    before and others were not: that choice is kept. Train the model with
    `meft.SparseAdamW`, as every other optimizer is refused. The rows are the parameter
    `neurons` of each adapter. They are always float32, and in host memory whatever the
    model is moved to (with `placement="resident"` they follow the model).
    `save_pretrained()` and `meft.save_adapters()` save them, and not what is frozen.

    Args:
        model: any class of a supported family but BART, ViT and DeiT, or a PeftModel
            that holds one. To use `make_reversible` too, call it afterwards.
        config: neurons, routing and placement of rows.
        save_backbone: whether `model.save_pretrained` also writes what is frozen, so
            that the directory holds the whole model.

    Returns:
        `model` itself.

    Raises:
        UnsupportedModelError: the model is not of such a class, or it has sparse
            adapters already.
        HostMemoryError: host memory does not suffice to train that many neurons.

    Warns:
        FrozenWarning: a task head was frozen before and stays frozen, or a head stays
            frozen because it may be pre-trained.
    """
    insert_sparse_adapters(model, config)
    add_saving(model, SparseAdapter, load_adapters, save_backbone)
    return model


def remove_adapters(model: Model) -> Model:
    """Undo `make_reversible` and `add_sparse_adapters`, in place.

    The model is then the plain one again: the same blocks, with the same parameters, in
    a list of their own, and no hooks of meft. It computes what it did before the
    conversion, bit by bit, except for other parameters that were trained, such as a
    task head or LoRA inside. Which parameters are trainable stays as it is. Adapters
    cannot be merged into the weights of the backbone, as they are not linear.

    Args:
        model: a converted model, or a PeftModel that holds one.

    Returns:
        `model` itself.

    Raises:
        UnsupportedModelError: the model has not been converted.
    """
    _refuse_plain(model)
    remove_stacks(model)
    if sparse_adapters(model):
        remove_sparse_adapters(model)
    remove_saving(model)
    return model


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Run the body with the model as it was before the conversion.

    Task heads and other parameters keep their trained values, and peft's adapters run:
    use the method of the same name of a PeftModel for these. A forward in the body must
    be differentiated, if at all, in the body too. Nothing can be saved, and `train()`,
    `eval()` and `to()` do not reach the adapters.

    Args:
        model: a converted model, or a PeftModel that holds one.

    Yields:
        Nothing.

    Raises:
        UnsupportedModelError: the model has not been converted.
    """
    _refuse_plain(model)
    with without_saving(model), without_stacks(model), without_sparse_adapters(model):
        yield


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the number of trainable and of all parameters of a model.

    The line has the format of the method of the same name in peft. Rows of sparse
    adapters count wherever they are stored.

    Args:
        model: any model.
    """
    every = {id(p): p for p in model.parameters()}.values()
    total = sum(_numel(p) for p in every)
    trainable = sum(_numel(p) for p in every if p.requires_grad)
    share = 100 * trainable / total if total else 0.0
    print(
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {share:.4f}"
    )


def _numel(parameter: Tensor) -> int:
    """Return the numbers of a parameter, of which other processes may have some."""
    rows = rows_of(parameter)
    if rows is None or rows.division is None:
        return parameter.numel()
    return rows.division.num_rows * rows.store.width


def _refuse_plain(model: nn.Module) -> None:
    if not find_stacks(model) and not sparse_adapters(model):
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no adapters of meft: neither "
            "`meft.make_reversible()` nor `meft.add_sparse_adapters()` has been called "
            "on it, or this is inside of `meft.disable_adapter`"
        )
