"""Bytes that a model copies between host and device, by the books of its modules.

A reversible stack with its lost bits in host memory, and a checkpointed block with its
input there, book every copy where it is made. Sparse adapters have books of their own
(`rows`).
"""

from torch import nn

from meft.reversible.blocks import ReversibleBlocks
from meft.transfer import TransferLedger
from meft_bench.child.methods.checkpointing import CheckpointedBlock


def ledgers_of(model: nn.Module) -> list[TransferLedger]:
    """Return the books of modules that copy activations; empty if there are none."""
    return [
        module.ledger
        for module in model.modules()
        if isinstance(module, ReversibleBlocks | CheckpointedBlock) and _copies(module)
    ]


def _copies(module: ReversibleBlocks | CheckpointedBlock) -> bool:
    if isinstance(module, CheckpointedBlock):
        return module.offload
    return module.reversible.side_buffer == "host"
