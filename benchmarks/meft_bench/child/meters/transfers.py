"""Bytes that a model copies between host and device, by the books of its modules.

A reversible stack with its lost bits in host memory books every copy where it is made.
Sparse adapters have books of their own (`rows`).
"""

from torch import nn

from meft.reversible.blocks import find_stacks
from meft.transfer import TransferLedger


def ledgers_of(model: nn.Module) -> list[TransferLedger]:
    """Return the books of modules that copy activations; empty if there are none."""
    stacks = find_stacks(model).values()
    return [s.ledger for s in stacks if s.reversible.side_buffer == "host"]
