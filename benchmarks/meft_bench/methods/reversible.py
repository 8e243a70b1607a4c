"""MEFT (Liao et al., NeurIPS 2023): three variants, two arithmetics, rebuilt or stored.

`meftN` is the paper's, in floats; `meftN_exact` has integer streams and an exact
inverse. Both rebuild their activations in the backward; `..._store` is the same
function under ordinary autograd, the reference for memory, speed and exactness. All
train the adapters and the new classifier.
"""

from functools import partial

from transformers import BertForSequenceClassification

import meft
from meft_bench.cell import Cell


def _in_floats(
    model: BertForSequenceClassification, cell: Cell, *, variant: str, backward: str
) -> BertForSequenceClassification:
    config = meft.ReversibleConfig(
        variant=variant,
        arithmetic="float",
        bottleneck_size=cell.bottleneck_size,
        backward=backward,
    )
    return meft.make_reversible(model, config)


def _exact(
    model: BertForSequenceClassification, cell: Cell, *, variant: str, backward: str
) -> BertForSequenceClassification:
    config = meft.ReversibleConfig(
        variant=variant,
        arithmetic="fixed",
        lost_bits=cell.lost_bits,
        bottleneck_size=cell.bottleneck_size,
        backward=backward,
    )
    return meft.make_reversible(model, config)


meft1 = partial(_in_floats, variant="meft1", backward="rebuild")
meft2 = partial(_in_floats, variant="meft2", backward="rebuild")
meft3 = partial(_in_floats, variant="meft3", backward="rebuild")
meft1_store = partial(_in_floats, variant="meft1", backward="store")
meft2_store = partial(_in_floats, variant="meft2", backward="store")
meft3_store = partial(_in_floats, variant="meft3", backward="store")
meft1_exact = partial(_exact, variant="meft1", backward="rebuild")
meft2_exact = partial(_exact, variant="meft2", backward="rebuild")
meft3_exact = partial(_exact, variant="meft3", backward="rebuild")
meft1_exact_store = partial(_exact, variant="meft1", backward="store")
meft2_exact_store = partial(_exact, variant="meft2", backward="store")
meft3_exact_store = partial(_exact, variant="meft3", backward="store")
