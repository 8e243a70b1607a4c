"""`make_reversible` and `add_sparse_adapters`: convert a model in place."""

from typing import TypeVar

from torch import nn

from meft.checkpoint.load import load_adapters
from meft.checkpoint.save_pretrained import add_saving
from meft.reversible.blocks import ReversibleBlocks
from meft.reversible.config import ReversibleConfig
from meft.reversible.convert import insert_stacks
from meft.sparse.adapter import SparseAdapter
from meft.sparse.config import SparseConfig
from meft.sparse.convert import insert_sparse_adapters

Model = TypeVar("Model", bound=nn.Module)


def make_reversible(model: Model, config: ReversibleConfig) -> Model:
    """Replace every list of blocks in a model by a reversible stack, in place.

    The model keeps its class, its `forward` signature and its outputs. Afterwards the
    adapters and a newly made task head (`classifier`, `qa_outputs`, `score`, ...) are
    trainable and everything else is frozen (Liao et al., NeurIPS 2023, section 4.1).
    If some parameters were frozen before and others were not, manually or because the
    model is a PeftModel, that choice is kept and the adapters are trained in addition.
    Change `requires_grad` afterwards to train more or fewer parameters. With
    `adapter=None` in the config, `requires_grad` is left as it is: a PeftModel trains
    what peft has added, and a plain model all of its parameters.

    From then on, `model.save_pretrained` also writes the files of `meft.save_adapters`.

    Args:
        model: any class of a supported family, which `meft.backbone.families` lists, or
            a PeftModel that holds one.
        config: variant, arithmetic, span and backward pass.

    Returns:
        `model` itself.

    Raises:
        UnsupportedModelError: the model is not of a supported family, is already
            reversible, or has gradient checkpointing on.
        ConfigError: `config.span` reaches beyond the model's blocks.

    Warns:
        FrozenWarning: a task head was frozen before and stays frozen, or a head stays
            frozen because it may be pre-trained.
    """
    insert_stacks(model, config)
    add_saving(model, ReversibleBlocks, load_adapters)
    return model


def add_sparse_adapters(model: Model, config: SparseConfig) -> Model:
    """Add a sparse adapter next to the feed-forward of every block, in place.

    The model keeps its class, its `forward` signature and its outputs; initially it
    computes the same function as before. Afterwards routers, rows and a newly made task
    head are trainable and everything else is frozen, unless some parameters were frozen
    before and others were not: that choice is kept. Train the model with
    `meft.SparseAdamW`, as every other optimizer is refused. The rows are the parameter
    `neurons` of each adapter. They are always float32, and in host memory whatever the
    model is moved to (with `placement="resident"` they follow the model).
    `save_pretrained()` and `meft.save_adapters()` save them.

    Args:
        model: any class of a supported family but BART, ViT and DeiT, or a PeftModel
            that holds one. To use `make_reversible` too, call it afterwards.
        config: neurons, routing and placement of rows.

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
    add_saving(model, SparseAdapter, load_adapters)
    return model
