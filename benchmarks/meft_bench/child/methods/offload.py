"""Activations in host memory until backward needs them, with nothing recomputed.

save_on_cpu   torch's `torch.autograd.graph.save_on_cpu`: each tensor that a block saves
              is copied while the computation waits, weights among them
streamed      TRL's `OffloadActivations`, on a stream of its own and without weights;
              CUDA only

Checkpoints that are offloaded are methods of `checkpointing`.
"""

import functools
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from meft.backbone.find import find_blocks
from meft.transfer import TransferLedger
from meft_bench.child.methods.checkpointing import saved_on_host
from meft_bench.child.methods.full import full
from meft_bench.child.methods.lora import lora
from meft_bench.shared import optional
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import MissingError

Method = Callable[[PreTrainedModel, Cell], PreTrainedModel]


def full_save_on_cpu(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply full fine-tuning with all that blocks save in host memory."""
    return _save_on_cpu(full, model, cell)


def lora_save_on_cpu(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply LoRA with all that blocks save in host memory."""
    return _save_on_cpu(lora, model, cell)


def full_streamed(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply full fine-tuning with activations streamed to host memory."""
    return _streamed(full, model, cell)


def lora_streamed(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply LoRA with activations streamed to host memory."""
    return _streamed(lora, model, cell)


def _save_on_cpu(method: Method, model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    model = method(model, cell)
    for found in find_blocks(model):
        blocks = nn.ModuleList(
            OffloadedBlock(block, f"{found.name}.{index}")
            for index, block in enumerate(found.listed)
        )
        setattr(found.owner, found.attribute, blocks)
    return model


class OffloadedBlock(nn.Module):
    """A block whose saved tensors are in host memory.

    Args:
        block: the block.
        name: name under which their bytes are counted.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        super().__init__()
        self.block = block
        self.name = name
        self.host_ledger = TransferLedger()
        """Bytes copied to and from host memory so far."""
        if hasattr(block, "attention_type"):  # read by the loop of ModernBERT
            self.attention_type = block.attention_type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output: `batch seq hidden`, or a tuple with it."""
        with saved_on_host(self.host_ledger, self.name):
            return self.block(hidden, *args, **kwargs)


def _streamed(method: Method, model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    if cell.device == "cpu":
        raise MissingError(
            f"method {cell.method!r} needs a stream of CUDA, and the device is 'cpu': "
            "take 'save-on-cpu', or run it where there is a GPU"
        )
    needed_by = f"method {cell.method!r}"
    library = optional.library("trl.models.activation_offloading", "trl", needed_by)
    if isinstance(next(model.parameters()), FakeTensor):
        raise ValueError(
            f"{needed_by} cannot be planned: TRL knows tensors by their addresses, and "
            "those of a virtual GPU have none. Take 'save-on-cpu', or run it"
        )
    PartialState(cpu=True)  # without it, no warning of TRL could be written
    model = method(model, cell)
    offloading = library.get_act_offloading_ctx_manager(model)
    forward = model.forward

    @functools.wraps(forward)
    def offloaded(*args: Any, **kwargs: Any) -> Any:
        with offloading:
            return forward(*args, **kwargs)

    model.forward = offloaded
    return model
