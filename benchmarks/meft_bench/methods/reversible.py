"""MEFT (Liao et al., NeurIPS 2023): three variants, rebuilt or stored.

`meftN` rebuilds its activations in the backward; `meftN_store` is the same function
under ordinary autograd, the reference for memory, speed and exactness. Both train the
adapters and the new classifier.
"""

from functools import partial

from transformers import BertForSequenceClassification

import meft
from meft_bench.cell import Cell


def _reversible(
    model: BertForSequenceClassification, cell: Cell, *, variant: str, backward: str
) -> BertForSequenceClassification:
    config = meft.ReversibleConfig(
        variant=variant, bottleneck_size=cell.bottleneck_size, backward=backward
    )
    return meft.make_reversible(model, config)


meft1 = partial(_reversible, variant="meft1", backward="rebuild")
meft2 = partial(_reversible, variant="meft2", backward="rebuild")
meft3 = partial(_reversible, variant="meft3", backward="rebuild")
meft1_store = partial(_reversible, variant="meft1", backward="store")
meft2_store = partial(_reversible, variant="meft2", backward="store")
meft3_store = partial(_reversible, variant="meft3", backward="store")
