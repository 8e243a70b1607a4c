"""Bytes that a model copies between host and device, by the books of its modules.

A reversible stack with its lost bits in host memory books every copy where it is made,
and so does a module with a `host_ledger`, as a checkpointed block with its input there.
Sparse adapters have books of their own (`rows`).
"""

from torch import nn

from meft.reversible.blocks import ReversibleBlocks
from meft.transfer import TransferLedger


def ledgers_of(model: nn.Module) -> list[TransferLedger]:
    """Return the books of modules that copy activations; empty if there are none."""
    found = (_ledger_of(module) for module in model.modules())
    return [ledger for ledger in found if ledger is not None]


def _ledger_of(module: nn.Module) -> TransferLedger | None:
    if isinstance(module, ReversibleBlocks):
        return module.ledger if module.reversible.side_buffer == "host" else None
    ledger = getattr(module, "host_ledger", None)
    return ledger if isinstance(ledger, TransferLedger) else None
