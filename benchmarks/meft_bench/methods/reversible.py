"""MEFT (Liao et al., NeurIPS 2023): three variants, rebuilt or stored.

`meftN` rebuilds its activations in the backward; `meftN_store` is the same function
under ordinary autograd, the reference for memory, speed and exactness. Both train the
adapters and the new classifier.
"""

from transformers import BertForSequenceClassification

import meft
from meft_bench.cell import Cell


def meft1(
    model: BertForSequenceClassification, cell: Cell
) -> BertForSequenceClassification:
    """MEFT1, rebuilt."""
    return _reversible(model, cell, "meft1", "rebuild")


def meft2(
    model: BertForSequenceClassification, cell: Cell
) -> BertForSequenceClassification:
    """MEFT2, rebuilt."""
    return _reversible(model, cell, "meft2", "rebuild")


def meft3(
    model: BertForSequenceClassification, cell: Cell
) -> BertForSequenceClassification:
    """MEFT3, rebuilt."""
    return _reversible(model, cell, "meft3", "rebuild")


def meft1_store(
    model: BertForSequenceClassification, cell: Cell
) -> BertForSequenceClassification:
    """MEFT1, stored."""
    return _reversible(model, cell, "meft1", "store")


def meft2_store(
    model: BertForSequenceClassification, cell: Cell
) -> BertForSequenceClassification:
    """MEFT2, stored."""
    return _reversible(model, cell, "meft2", "store")


def meft3_store(
    model: BertForSequenceClassification, cell: Cell
) -> BertForSequenceClassification:
    """MEFT3, stored."""
    return _reversible(model, cell, "meft3", "store")


def _reversible(
    model: BertForSequenceClassification, cell: Cell, variant: str, backward: str
) -> BertForSequenceClassification:
    config = meft.ReversibleConfig(
        variant=variant, bottleneck_size=cell.bottleneck_size, backward=backward
    )
    return meft.make_reversible(model, config)
