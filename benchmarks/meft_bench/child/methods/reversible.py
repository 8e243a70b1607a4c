"""MEFT (Liao et al., NeurIPS 2023): three variants, two arithmetics, rebuilt or stored.

`meftN` is the paper's method, in floating point; `meftN_exact` has integer streams and
an exact inverse. They train the adapters of their blocks and the new head. `lora_exact`
and `full_exact` have no such adapters: LoRA inside the blocks trains, or every
parameter, in a model with integer streams. All rebuild their activations in backward;
`..._store` is the same function under ordinary autograd, the reference for memory,
speed and exactness.
"""

from functools import partial
from typing import Any

from transformers import PreTrainedModel

import meft
from meft.backbone.find import find_blocks
from meft_bench.child.methods.full import full
from meft_bench.shared.cell import Cell

_GRADIENT_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def _in_floats(model: PreTrainedModel, cell: Cell, **kind: Any) -> PreTrainedModel:
    return _reversible(model, cell, arithmetic="float", **kind)


def _exact(model: PreTrainedModel, cell: Cell, **kind: Any) -> PreTrainedModel:
    if kind["backward"] == "rebuild":
        kind["side_buffer"] = cell.side_buffer
    return _reversible(
        model,
        cell,
        arithmetic="fixed",
        lost_bits=cell.lost_bits,
        gradient_dtype=_GRADIENT_DTYPES[cell.gradient_dtype],
        **kind,
    )


def _lora_exact(model: PreTrainedModel, cell: Cell, **kind: Any) -> PreTrainedModel:
    from meft_bench.child.methods.lora import lora  # peft takes seconds to import

    return _exact(lora(model, cell), cell, adapter=None, **kind)


def _full_exact(model: PreTrainedModel, cell: Cell, **kind: Any) -> PreTrainedModel:
    return _exact(full(model, cell), cell, adapter=None, **kind)


def _reversible(model: PreTrainedModel, cell: Cell, **kind: Any) -> PreTrainedModel:
    if "variant" in kind:
        kind["bottleneck_size"] = cell.bottleneck_size
    config = meft.ReversibleConfig(
        mlp_chunks=cell.mlp_chunks,
        span=_span(model, cell),
        **kind,
    )
    return meft.make_reversible(model, config)


def _span(model: PreTrainedModel, cell: Cell) -> tuple[int, int] | None:
    num_blocks = min(len(found.blocks) for found in find_blocks(model))
    if cell.reversible_blocks > num_blocks:
        raise ValueError(
            f"`reversible_blocks` is {cell.reversible_blocks}, but {cell.backbone} has "
            f"{num_blocks} blocks in a stack: lower it, or take 0 to rebuild all of "
            "them"
        )
    return (0, cell.reversible_blocks) if cell.reversible_blocks else None


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
lora_exact = partial(_lora_exact, backward="rebuild")
full_exact = partial(_full_exact, backward="rebuild")
lora_exact_store = partial(_lora_exact, backward="store")
full_exact_store = partial(_full_exact, backward="store")
