"""Gradient checkpointing of any model, as transformers does it.

Methods of a known family checkpoint its blocks themselves (`checkpointing`). A model of
another family, and one with a config of PEFT, is checkpointed as its users do it, by
transformers, with the inputs of its layers on the device or in host memory.
"""

from typing import Any

from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint as checkpoint_of_torch

from meft_bench.child.backbones.unwrapped import base_of
from meft_bench.shared.cell import Cell


def is_checkpointed(cell: Cell) -> bool:
    """Return whether the name of a cell's method says that it is checkpointed."""
    kind = cell.method.partition(":")[0]
    return kind.removesuffix("-offload").endswith("checkpointing")


def checkpoint(model: Any, *, offload: bool = False) -> None:
    """Checkpoint the layers of a model, in place.

    Args:
        model: the model, which PEFT may have wrapped.
        offload: whether the inputs of layers are kept in host memory.

    Raises:
        ValueError: transformers cannot checkpoint it.
    """
    base = base_of(model)
    if not base.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(base).__name__} of transformers does not support gradient "
            "checkpointing"
        )
    base.config.use_cache = False  # as transformers does by itself
    # The first name is that of transformers 5.23 and later.
    name = "activation_checkpointing_enable"
    if not hasattr(base, name):
        name = "gradient_checkpointing_enable"
    getattr(base, name)({"use_reentrant": False})
    if offload:
        # As `offload=True` does from transformers 5.24 on.
        base._set_gradient_checkpointing(
            enable=True, gradient_checkpointing_func=_on_host
        )
    if model is not base:
        base.enable_input_require_grads()


def _on_host(function: Any, *args: Any, **kwargs: Any) -> Any:
    with save_on_cpu(pin_memory=True):
        return checkpoint_of_torch(function, *args, use_reentrant=False, **kwargs)
